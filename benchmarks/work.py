"""One participant of a comparison: it builds its trainer, then does one turn of work for each line it is sent.

    python benchmarks/work.py PARTICIPANT '{"work": "dpo", "pairs": 32, ...}'       (started by run.py)

PARTICIPANT: ours; trl, with GPT-2 as transformers makes it; trl-fused, given the one-kernel activation that our
`models.load_policy` puts in.

A turn is one training step, one PPO rollout with its updates, or one generation. `turns(units)` ends a turn: it
answers with the seconds it took and what it got done, and waits for the next line; the clock stands still meanwhile.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1"
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

import datasets
import numpy as np
import torch
from transformers.activations import ACT2FN

from rlhf_edu import (
    logprobs,
    losses,
    models,
    ppo,
    preference,
    reward_model,
    rewards,
    sampling,
    sft,
    tokens,
    training,
)

FOREVER = 10**6  # steps: the parent decides when it has seen enough


@dataclasses.dataclass(frozen=True)
class Size:
    """What is the same for everybody: the model, the pairs, the batch."""

    pairs: int = 32  # a batch; SFT: twice as many sequences
    prompt: int = 8  # tokens
    shortest: int = 8  # tokens of a completion, EOS among them
    longest: int = 40
    width: int = 256
    layers: int = 4
    vocabulary: int = 4096
    prompts: int = 256  # generated at a time
    episodes: int = 128  # a rollout
    passed: int = 128  # pairs of one measurement of the reference pass
    threads: int = 2


class Turns:
    """`turns(units)`: say what was done since the last call and in what time, then wait for the next turn."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")  # the libraries' own prints go to stderr
        os.dup2(2, 1)
        self.began = None

    def __call__(self, units: float | None = None, kind: str = "step"):
        seconds = None if self.began is None else time.perf_counter() - self.began
        answer = {"kind": kind, "seconds": seconds, "units": units, "memory": peak_memory()}
        print(json.dumps(answer), file=self.answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter()


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def tokenizer_of(size: Size):
    """Words w0, w1, ... each one token; a completion gets EOS from whoever tokenizes it."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(size.vocabulary - 2))]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def comparisons_of(size: Size, number: int) -> datasets.Dataset:
    """Random pairs: prompts of `prompt` tokens, completions uniform between `shortest` and `longest` with EOS."""
    rng = training.rng(0, 71)

    def text(tokens):
        return " ".join(f"w{i}" for i in rng.integers(size.vocabulary - 2, size=tokens))

    lengths = rng.integers(size.shortest, size.longest + 1, size=(number, 2)) - 1  # EOS is the last
    rows = [
        {"prompt": text(size.prompt), "chosen": " " + text(a), "rejected": " " + text(b)} for a, b in lengths
    ]
    return datasets.Dataset.from_list(rows)


def policy_of(size: Size, tokenizer, stops: float = 0.0, activation: str = models.FUSED_GELU):
    """A random GPT-2. stops: about this probability of EOS after every token, so that responses end as real ones.

    activation: ours, which `models.load_policy` gives every GPT-2, or the same function as transformers computes it
    for GPT-2 ("gelu_new").
    """
    context = max(64, size.prompt + size.longest)
    policy = models.new_policy(
        tokenizer, 0, layers=size.layers, width=size.width, heads=size.width // 32, context=context
    )
    policy.config.activation_function = activation  # for the classifiers made from it
    for block in policy.transformer.h:
        block.mlp.act = ACT2FN[activation]
    if stops:
        with torch.no_grad():
            direction = policy.transformer.wte.weight[tokenizer.eos_token_id]
            policy.transformer.ln_f.bias += (
                direction / direction.square().sum() * np.log(size.vocabulary * stops)
            )
    return policy


STOPS = (
    0.04  # probability of EOS after each token in the works that sample: mean length about 20 of at most 40
)


# --- ours ---


def ours(work: str, size: Size, turns: Turns):
    training.set_threads(size.threads)
    tokenizer = tokenizer_of(size)
    policy = policy_of(size, tokenizer, stops=STOPS if work in ("ppo", "generation") else 0.0)
    if work.startswith("generation"):
        return our_generation(policy, tokenizer, size, turns)
    if work == "ppo":
        return our_ppo(policy, tokenizer, size, turns)
    comparisons = comparisons_of(size, max(4 * size.pairs, 3 * size.passed))
    config = training.TrainConfig(steps=FOREVER, learning_rate=1e-5, log_every=10)
    units = 2 * size.pairs if work == "sft" else size.pairs
    loop = {"tokenizer": tokenizer, "config": config, "batch_size": units}
    loop["after_step"] = lambda step: turns(units if step else None)
    if work == "sft":
        prompts = tokens.encode(tokenizer, comparisons["prompt"][:] * 2)
        responses = comparisons["chosen"][:] + comparisons["rejected"][:]
        responses = tokens.encode_responses(tokenizer, responses, max_tokens=size.longest)
        return sft.train_sft(policy, prompts, responses, **loop)
    if work == "reward model":
        return reward_model.train_reward_model(models.classifier_from(policy, 1, 0), comparisons, **loop)
    if work == "dpo":
        our_reference_pass(policy, comparisons, tokenizer, size, turns)
    loss = {"dpo": losses.dpo_loss, "simpo": losses.simpo_loss, "orpo": losses.orpo_loss}[work]
    preference.train_preference(policy, comparisons, loss, max_tokens=size.longest, **loop)


def our_reference_pass(policy, comparisons, tokenizer, size: Size, turns: Turns):
    """What a run does once before its first step, here on `passed` pairs at a time."""
    for start in range(0, 3 * size.passed, size.passed):
        part = comparisons.select(range(start, start + size.passed))
        pairs = preference.tokenize_pairs(part, tokenizer, max_tokens=size.longest)
        turns()
        logprobs.all_logps(policy, tokenizer.pad_token_id, pairs.prompts, pairs.responses)
        turns(size.passed, "reference")


def our_generation(policy, tokenizer, size: Size, turns: Turns):
    prompts = tokens.encode(tokenizer, comparisons_of(size, size.prompts)["prompt"])
    eos = tokenizer.eos_token_id
    turns()
    for seed in range(FOREVER):
        responses = sampling.sample(policy, prompts, eos_id=eos, max_tokens=size.longest, seed=seed)
        turns(sum(map(len, responses)))


def our_ppo(policy, tokenizer, size: Size, turns: Turns):
    prompts = tokens.encode(tokenizer, comparisons_of(size, 8 * size.episodes)["prompt"])
    config = ppo.PPOConfig(
        rollouts=FOREVER, episodes=size.episodes, epochs=2, minibatches=2, max_tokens=size.longest, learning_rate=1e-6
    )  # fmt: skip
    updates = config.updates_a_rollout
    ppo.train_ppo(
        policy, prompts, rewards.reward_model_score(models.classifier_from(policy, 1, 0), tokenizer),
        tokenizer=tokenizer, reference=models.copy_of(policy), config=config,
        after_step=lambda step: None if step % updates else turns(size.episodes if step else None),
    )  # fmt: skip


# --- TRL's and transformers' ---


def settings(size: Size, **more) -> dict:
    """TRL's defaults, but for what suits a small model on a CPU: no bfloat16 and no gradient checkpointing."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="rlhf_edu_benchmark_"), "max_steps": FOREVER, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    } | more  # fmt: skip


def trl(work: str, size: Size, turns: Turns, activation: str = "gelu_new"):
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns()

        def on_step_end(self, *_, **__):
            turns(units)

    torch.set_num_threads(size.threads)
    tokenizer = tokenizer_of(size)
    stops = STOPS if work in ("ppo", "generation") else 0.0
    policy = policy_of(size, tokenizer, stops, activation).train()
    if work.startswith("generation"):
        return their_generation(policy, tokenizer, size, turns)
    if work == "ppo":
        units = size.episodes
        return their_ppo(policy, tokenizer, size, Gate)
    comparisons = comparisons_of(size, max(4 * size.pairs, 3 * size.passed))
    units = 2 * size.pairs if work == "sft" else size.pairs
    length = size.prompt + size.longest
    same = settings(size, per_device_train_batch_size=units, max_length=length, learning_rate=1e-5)
    given = {"processing_class": tokenizer, "train_dataset": comparisons, "callbacks": [Gate()]}
    if work == "sft":
        from trl import SFTConfig, SFTTrainer

        sides = [
            comparisons.select_columns(["prompt", s]).rename_column(s, "completion")
            for s in ("chosen", "rejected")
        ]
        given["train_dataset"] = datasets.concatenate_datasets(sides)
        trainer = SFTTrainer(policy, SFTConfig(**same), **given)
    elif work == "reward model":
        from trl import RewardConfig, RewardTrainer

        trainer = RewardTrainer(models.classifier_from(policy, 1, 0).train(), RewardConfig(**same), **given)
    elif work == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        config = CPOConfig(**same, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
        trainer = CPOTrainer(policy, config, **given)
    elif work == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(policy, ORPOConfig(**same), **given)
    else:
        from trl import DPOConfig, DPOTrainer

        class Timed(DPOTrainer):
            def _precompute_ref_logps(self, dataset, *more):
                for start in range(0, 3 * size.passed, size.passed):
                    turns()
                    super()._precompute_ref_logps(dataset.select(range(start, start + size.passed)), *more)
                    turns(size.passed, "reference")
                return super()._precompute_ref_logps(dataset, *more)

        config = DPOConfig(**same, precompute_ref_log_probs=work == "dpo precomputed")
        reference = None if config.precompute_ref_log_probs else models.copy_of(policy)
        trainer = Timed(model=policy, ref_model=reference, args=config, **given)
    trainer.train()


def their_generation(policy, tokenizer, size: Size, turns: Turns):
    prompts = torch.tensor(tokens.encode(tokenizer, comparisons_of(size, size.prompts)["prompt"]))
    policy.eval()
    torch.manual_seed(0)
    turns()
    while True:
        out = policy.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=size.longest,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )[:, prompts.shape[1] :]  # fmt: skip
        turns(int((out != tokenizer.pad_token_id).sum()))


def their_ppo(policy, tokenizer, size: Size, gate):
    """TRL dropped PPO after 1.12.0; run.py puts that version in front of the path of this process."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts = tokens.encode(tokenizer, comparisons_of(size, 8 * size.episodes)["prompt"])
    config = PPOConfig(**settings(
        size, max_steps=-1, per_device_train_batch_size=size.episodes // 2, gradient_accumulation_steps=2,
        num_mini_batches=2, num_ppo_epochs=2, total_episodes=FOREVER, response_length=size.longest,
        stop_token="eos", temperature=1.0, num_sample_generations=0, learning_rate=1e-6,
    ))  # fmt: skip
    PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=models.copy_of(policy),
        reward_model=models.classifier_from(policy, 1, 0), value_model=models.classifier_from(policy, 1, 0),
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}), callbacks=[gate()],
    ).train()  # fmt: skip


def main(participant: str, given: str):
    given = json.loads(given)
    work, turns, size = given.pop("work"), Turns(), Size(**given)
    run = {"ours": ours, "trl": trl, "trl-fused": functools.partial(trl, activation=models.FUSED_GELU)}
    run[participant](work, size, turns)


if __name__ == "__main__":
    main(*sys.argv[1:])
