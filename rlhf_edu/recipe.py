"""Training on comparisons from a configuration file, for models and data sets larger than the course's own.

python -m rlhf_edu train configs/llama3_8b_ultrafeedback_simpo.json --estimate      memory alone, no download
python -m rlhf_edu train FILE --output FOLDER
"""

import dataclasses
import json
from pathlib import Path

import datasets
import torch
import transformers

from . import data, estimate, hub, lora, losses, parallel
from .errors import UserError, explained
from .models import best_device, load_policy, save_model
from .pairs import tokenize_pairs
from .preference import train_preference
from .progress import Progress
from .tables import read_json, write_csv, write_json
from .tokens import load_tokenizer
from .training import Memory, TrainConfig, only_one, rng, set_threads


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All of a run. `sources` says where each value is from; nothing reads it but people."""

    policy: str  # a name of the hub, or a folder
    comparisons: (
        str  # a data set of the hub, or a .jsonl file: {"prompt", "chosen", "rejected"}, texts or chats
    )
    loss: str  # dpo, simpo, ...: a loss of `losses`
    loss_kwargs: dict
    learning_rate: float
    batch: int  # pairs an update
    max_prompt: int  # tokens; a longer prompt keeps its end
    max_tokens: int  # of a response; a longer one keeps its start
    split: str = "train"
    epochs: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.1
    lora_rank: int | None = None  # None: all weights learn
    lora_alpha: float = 32.0
    micro_batch: int | None = None  # pairs in memory at once
    bf16: bool = True  # with LoRA the frozen weights are held in bfloat16, too
    checkpointing: bool = False
    architecture: dict | None = None  # of the policy, for an estimate without the network
    sources: dict = dataclasses.field(default_factory=dict)

    @property
    def memory(self) -> Memory:
        return Memory(micro_batch=self.micro_batch, bf16=self.bf16, checkpointing=self.checkpointing)


CHANGES_NO_NUMBER = ("micro_batch", "checkpointing", "sources", "architecture")  # a run may go on with others


def load(path: Path) -> Recipe:
    """A recipe from its JSON file, or one sentence about what is wrong with it."""
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    values = read_json(path, needed, "compare it with configs/llama3_8b_ultrafeedback_simpo.json")
    if stray := sorted(set(values) - set(fields)):
        raise UserError(f"{path}: there is no setting {stray[0]!r}; there are {', '.join(fields)}")
    recipe = Recipe(**values)
    if not hasattr(losses, f"{recipe.loss}_loss"):
        raise UserError(
            f'{path}: there is no loss {recipe.loss!r}; name one of rlhf_edu/losses.py, as in "simpo"'
        )
    for name in ("learning_rate", "batch", "max_prompt", "max_tokens", "epochs"):
        value = getattr(recipe, name)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path}: {name} is {value!r}; it must be a number above 0")
    return recipe


def memory_of(recipe: Recipe, rank: int | None) -> dict[str, float]:
    """Bytes of one device: full fine-tuning (rank None) or LoRA; the reference of DPO's kind is the adapter off."""
    if recipe.architecture:
        config = transformers.AutoConfig.for_model(**recipe.architecture)
    else:
        with explained(
            f"reading the shape of {recipe.policy}", "connect to the network once, or name a folder"
        ):
            config = transformers.AutoConfig.from_pretrained(
                recipe.policy, revision=hub.revision(recipe.policy)
            )
    size = estimate.size_of(config)
    sequences = 2 * (recipe.micro_batch or recipe.batch)
    return estimate.training_bytes(
        size, sequences, recipe.max_prompt + recipe.max_tokens, recipe.memory,
        trained=rank and estimate.lora_weights(config, rank),
        frozen_bytes=2 if rank and recipe.bf16 else 4, predicted=recipe.max_tokens,
    )  # fmt: skip


def told(recipe: Recipe) -> str:
    """The estimate as text: for the recipe as it is, and beside it the other of LoRA and full fine-tuning."""
    lines = []
    for rank in (recipe.lora_rank, None if recipe.lora_rank else 16):
        needs = memory_of(recipe, rank)
        parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in needs.items() if value)
        lines.append(
            f"{f'LoRA of rank {rank}' if rank else 'all weights'}: {sum(needs.values()) / 1e9:.0f} GB ({parts})"
        )
    return "Estimate for one device, at the longest sequences. " + "; ".join(lines)


def comparisons_of(recipe: Recipe, tokenizer) -> datasets.Dataset:
    """The comparisons as texts. A chat (a list of messages) is written out by the tokenizer's own template."""
    if Path(recipe.comparisons).suffix == ".jsonl":
        rows = data.read_jsonl(recipe.comparisons, ("prompt", "chosen", "rejected"))
    else:
        with explained(f"loading {recipe.comparisons}", "connect to the network once, or name a .jsonl file"):
            rows = datasets.load_dataset(
                recipe.comparisons, split=recipe.split, revision=hub.revision(recipe.comparisons)
            )
    return datasets.Dataset.from_list([as_texts(row, tokenizer) for row in rows])


def as_texts(row: dict, tokenizer) -> dict:
    """{"prompt", "chosen", "rejected"} as texts. In a chat the prompt is all messages but the last.

    A chat's response ends as the template ends it; EOS is left out at its end, since `encode_responses` puts it there.
    """
    if isinstance(row["chosen"], str):
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    if not tokenizer.chat_template:
        raise UserError("the comparisons are chats, but the policy's tokenizer has no chat template: set one")
    try:
        prompt = tokenizer.apply_chat_template(row["chosen"][:-1], tokenize=False, add_generation_prompt=True)
        texts = {"prompt": prompt}
        for name in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row[name], tokenize=False)
            if not whole.startswith(prompt):
                raise UserError(
                    "the chat template writes the response otherwise than after the prompt: give the comparisons as texts"
                )
            texts[name] = whole[len(prompt) :].rstrip("\n").removesuffix(tokenizer.eos_token)
        return texts
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            'a chat must be a list of messages {"role", "content"} that ends with the response'
        ) from error


def train(recipe: Recipe, folder: Path, seed: int = 0):
    """Train, and write the metrics and the policy (or its adapter) into `folder`; stopped, the same call goes on."""
    set_threads()
    frozen = torch.bfloat16 if recipe.lora_rank and recipe.bf16 else torch.float32
    with only_one(folder):
        tokenizer = load_tokenizer(recipe.policy)
        policy = load_policy(recipe.policy, dtype=frozen).requires_grad_(recipe.lora_rank is None)
        if recipe.lora_rank:
            lora.add_lora(
                policy,
                rank=recipe.lora_rank,
                alpha=recipe.lora_alpha,
                seed=int(rng(seed, 61).integers(2**31)),
            )
        pairs = tokenize_pairs(
            comparisons_of(recipe, tokenizer), tokenizer, max_tokens=recipe.max_tokens, max_prompt=recipe.max_prompt
        )  # fmt: skip
        steps = max(1, round(recipe.epochs * len(pairs) / recipe.batch))
        config = TrainConfig(steps, recipe.learning_rate, recipe.warmup, recipe.schedule, seed=seed)
        progress = Progress({recipe.loss: 1.0})
        progress.start(recipe.loss)
        metrics = train_preference(
            policy, pairs, getattr(losses, f"{recipe.loss}_loss"), tokenizer=tokenizer, config=config,
            reference=lora.Reference(policy) if recipe.lora_rank else None, loss_kwargs=recipe.loss_kwargs,
            batch_size=recipe.batch, memory=recipe.memory, folder=folder / "run", progress=progress.update,
            fingerprint={k: v for k, v in dataclasses.asdict(recipe).items() if k not in CHANGES_NO_NUMBER},
        )  # fmt: skip
        progress.finish()
        if parallel.is_main():
            write_csv(metrics, folder / "metrics.csv")
            write_json(dataclasses.asdict(recipe) | {"seed": seed, "steps": steps}, folder / "recipe.json")
            if recipe.lora_rank:
                lora.save_adapter(policy, folder / "adapter")
            else:
                save_model(policy, tokenizer, folder / "policy")
        parallel.remove(folder / "run")
    return metrics


def command(options) -> None:
    """`python -m rlhf_edu train FILE`."""
    recipe = load(options.recipe)
    print(f"device {best_device()}; {json.dumps(dataclasses.asdict(recipe))}\n{told(recipe)}", flush=True)
    if not options.estimate:
        train(recipe, options.output or Path("outputs") / options.recipe.stem, options.seed)
