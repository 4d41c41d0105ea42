"""Our losses against the code of TRL 1.16.0, run, not copied: same random models, same batch, same number.

The preference trainers are built for real, around a one-layer GPT-2 of random weights and a tokenizer of 25
words; `same` compares their loss and its gradient with ours, from our own log-probs. Where TRL means another
loss, the test states the identity between the two. R-DPO, RRHF, unlikelihood, the value loss: not in TRL.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing needs the network

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from rlhf_edu.advantages import kl_estimates
from rlhf_edu.logprobs import response_logps, token_logps
from rlhf_edu.losses import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log1mexp,
    orpo_loss,
    ppo_policy_loss,
    preferred_ft_loss,
    reward_pair_loss,
    sft_loss,
    simpo_loss,
    slic_hf_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, of names transformers 6 will drop

WORDS = list("abcdefghijklmnopqrstuvw")
PAIRS = [  # prompt, chosen, rejected: lengths differ within pairs and within the batch
    ("a b c", "d e f g h", "i j"),
    ("k l", "m n", "o p q r s t u"),
    ("b", "c e g", "v w a d"),
    ("t u v w", "a", "b c d"),
]
EVEN_PAIRS = [  # prompts of one word, chosen responses of one length: here token mean and pair mean coincide
    ("a", "d e f", "i j"),
    ("k", "m n o", "p q r s"),
    ("b", "c e g", "v w a d h"),
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def tiny_gpt2(seed):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=25, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def settings(folder, **more):
    return dict(
        output_dir=str(folder), per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, max_length=32, **more,
    )  # fmt: skip


def rows(pairs):
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in pairs])


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def logps(model, ids, attention_mask, response_mask):
    return response_logps(model(ids, attention_mask=attention_mask).logits, ids, response_mask)


def same(theirs, ours, model):
    """The two losses agree, and so do their gradients in every weight of the model."""
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert abs(theirs.item()) > 1e-3
    weights = list(model.parameters())
    for got, want in zip(gradient(ours, weights), gradient(theirs, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def gradient(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def differ(theirs, ours):
    assert abs(theirs.item() - ours.item()) > 0.01 * abs(ours.item())


# --- with a reference model: trl.DPOTrainer ---


@pytest.fixture(scope="module")
def dpo(tokenizer, tmp_path_factory):
    """The trainer, one batch of its own making, and the arguments of our losses from that batch."""
    from trl import DPOConfig, DPOTrainer

    policy, reference = tiny_gpt2(0), tiny_gpt2(1)
    trainer = DPOTrainer(
        model=policy, ref_model=reference, args=DPOConfig(**settings(tmp_path_factory.mktemp("dpo"))),
        processing_class=tokenizer, train_dataset=rows(PAIRS),
    )  # fmt: skip
    batch = first_batch(trainer)
    inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])

    def ours():
        sums, lengths = logps(policy, *inputs)
        with torch.no_grad():
            ref_sums, _ = logps(reference, *inputs)
        names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        return dict(zip(names, (*sums.chunk(2), *ref_sums.chunk(2)), strict=True)), lengths.chunk(2)

    def theirs(loss_type, beta, label_smoothing=0.0):
        trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss_type], beta, label_smoothing
        return trainer.compute_loss(policy, batch)

    return SimpleNamespace(model=policy, ours=ours, theirs=theirs)


def test_batch_counts_eos(dpo):
    """The responses of `PAIRS` have 5, 2, 3, 1 and 2, 7, 4, 3 words; EOS makes each one longer."""
    chosen, rejected = dpo.ours()[1]
    assert sorted(chosen.tolist()) == [2, 3, 4, 6] and sorted(rejected.tolist()) == [3, 4, 5, 8]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(dpo, beta):
    arguments, _ = dpo.ours()
    same(dpo.theirs("sigmoid", beta), dpo_loss(**arguments, beta=beta).mean(), dpo.model)


def test_label_smoothing(dpo):
    """TRL's `sigmoid` has ignored label_smoothing since 0.29; ours is cDPO. Its `robust` is rDPO, unbiased
    where cDPO is conservative: [(1 - e) l(w, l) - e l(l, w)] / (1 - 2 e), with l our loss unsmoothed."""
    arguments, _ = dpo.ours()
    s_w, s_l, rho_w, rho_l = arguments.values()
    theirs = dpo.theirs("sigmoid", 0.5, label_smoothing=0.2)
    same(theirs, dpo_loss(**arguments, beta=0.5).mean(), dpo.model)
    theirs = dpo.theirs("robust", 0.5, label_smoothing=0.2)
    differ(theirs, dpo_loss(**arguments, beta=0.5, label_smoothing=0.2).mean())
    right, flipped = dpo_loss(**arguments, beta=0.5), dpo_loss(s_l, s_w, rho_l, rho_w, beta=0.5)
    same(theirs, ((0.8 * right - 0.2 * flipped) / 0.6).mean(), dpo.model)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ipo(dpo, tau):
    """TRL divides each log-ratio by its length in tokens before IPO eq. 17; ours takes the printed sums.

    The paper nowhere divides; TRL does since 0.7.11 because the authors of IPO said, in private, that their
    experiments did. Both regress on 1/(2 tau), so the same tau means a margin about |y| times larger there.
    """
    arguments, (chosen_lengths, rejected_lengths) = dpo.ours()
    theirs = dpo.theirs("ipo", tau)
    differ(theirs, ipo_loss(**arguments, tau=tau).mean())
    means = {k: v / (chosen_lengths if "chosen" in k else rejected_lengths) for k, v in arguments.items()}
    same(theirs, ipo_loss(**means, tau=tau).mean(), dpo.model)


def test_preferred_ft(dpo):
    """TRL's `sft` term is the mean over all chosen tokens of the micro-batch; ours is a sum per response."""
    arguments, (chosen_lengths, _) = dpo.ours()
    per_token = preferred_ft_loss(arguments["chosen_logps"]).sum() / chosen_lengths.sum()
    theirs = dpo.theirs("sft", 0.1)
    differ(theirs, sft_loss(arguments["chosen_logps"], chosen_lengths).mean())
    same(theirs, per_token, dpo.model)


def test_dpo_hinge_is_not_slic_hf(dpo):
    """TRL's DPO `hinge` is SLiC's hinge on log-*ratios*, with delta = 1/beta, times beta, without the NLL."""
    arguments, _ = dpo.ours()
    s_w, s_l, rho_w, rho_l = arguments.values()
    beta = 0.05
    theirs = dpo.theirs("hinge", beta)
    ours = beta * slic_hf_loss(s_w - rho_w, s_l - rho_l, delta=1 / beta, nll_weight=0.0).mean()
    same(theirs, ours, dpo.model)
    differ(theirs, slic_hf_loss(s_w, s_l).mean())


# --- KTO: trl.KTOTrainer ---


@pytest.mark.parametrize("seeds, clamped", [((0, 1), False), ((1, 0), True)])
def test_kto(tokenizer, tmp_path, seeds, clamped):
    """TRL averages over the 2n single responses, ours sums the two halves of each pair: exactly half.

    z0 is TRL's: mean log-ratio of the completions rotated by one in the batch, clamped at 0, beta outside.
    """
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference = map(tiny_gpt2, seeds)
    singles = [
        {"prompt": p, "completion": " " + text, "label": label}
        for p, chosen, rejected in PAIRS
        for text, label in ((chosen, True), (rejected, False))
    ]
    config = KTOConfig(**settings(tmp_path, beta=0.3, desirable_weight=2.0, undesirable_weight=3.0))
    data = Dataset.from_list(singles)
    trainer = KTOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer)
    batch = first_batch(trainer)
    theirs = trainer.compute_loss(policy, batch)

    inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    mismatched = (batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    sums, _ = logps(policy, *inputs)
    with torch.no_grad():
        ref_sums, _ = logps(reference, *inputs)
        z0 = (logps(policy, *mismatched)[0] - logps(reference, *mismatched)[0]).mean()
    assert (z0 < 0) == clamped
    desirable = batch["label"].bool()
    ours = kto_loss(
        sums[desirable],
        sums[~desirable],
        ref_sums[desirable],
        ref_sums[~desirable],
        beta=0.3,
        reference_point=z0.clamp(min=0),
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert len(ours) == 4
    same(theirs, ours.mean() / 2, policy)


# --- without a reference model: trl.experimental.cpo ---


@pytest.fixture(scope="module", params=["pairs", "even pairs"])
def cpo(request, tokenizer, tmp_path_factory):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy = tiny_gpt2(0)
    trainer = CPOTrainer(
        model=policy, args=CPOConfig(**settings(tmp_path_factory.mktemp("cpo"))), processing_class=tokenizer,
        train_dataset=rows(PAIRS if request.param == "pairs" else EVEN_PAIRS),
    )  # fmt: skip
    batch = first_batch(trainer)

    def theirs(loss_type, **attributes):
        defaults = {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "label_smoothing": 0.0}
        vars(trainer).update(defaults | attributes | {"loss_type": loss_type})
        return trainer.compute_loss(policy, batch)

    return SimpleNamespace(
        model=policy, theirs=theirs, ours=lambda: paired(policy, batch), even=request.param == "even pairs"
    )


def paired(model, batch):
    """Arguments of our losses from a batch of TRL's CPO and ORPO: summed log-probs and lengths."""
    result = {}
    for side in ("chosen", "rejected"):
        ids, attention, labels = (batch[f"{side}_{key}"] for key in ("input_ids", "attention_mask", "labels"))
        result[f"{side}_logps"], result[f"{side}_lengths"] = logps(model, ids, attention, labels != -100)
    sums = {k: v for k, v in result.items() if k.endswith("logps")}
    return sums, {k: v for k, v in result.items() if k.endswith("lengths")}


def test_cpo(cpo):
    """TRL's NLL is a mean over the chosen tokens of the micro-batch; ours, as in SimPO's table, a sum.

    So TRL's cpo_alpha is our nll_weight times the length, exactly so if chosen responses are equally long.
    """
    sums, lengths = cpo.ours()
    theirs = cpo.theirs("sigmoid", beta=0.3, cpo_alpha=0.7)
    differ(theirs, cpo_loss(**sums, beta=0.3, nll_weight=0.7).mean())
    token_mean = preferred_ft_loss(sums["chosen_logps"]).sum() / lengths["chosen_lengths"].sum()
    same(theirs, cpo_loss(**sums, beta=0.3, nll_weight=0.0).mean() + 0.7 * token_mean, cpo.model)
    if cpo.even:
        sums, _ = cpo.ours()
        theirs = cpo.theirs("sigmoid", beta=0.3, cpo_alpha=0.7)
        same(theirs, cpo_loss(**sums, beta=0.3, nll_weight=0.7 / 4).mean(), cpo.model)  # 3 words and EOS


def test_conservative_dpo_in_cpo(cpo):
    """TRL's CPO still has label_smoothing as in cDPO, so it can check ours with a reference of zeros."""
    sums, _ = cpo.ours()
    zeros = {f"ref_{k}": torch.zeros_like(v) for k, v in sums.items()}
    ours = dpo_loss(**sums, **zeros, beta=0.3, label_smoothing=0.2).mean()
    same(cpo.theirs("sigmoid", beta=0.3, label_smoothing=0.2, cpo_alpha=0.0), ours, cpo.model)


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (2.5, 1.375)])
def test_simpo(cpo, beta, gamma):
    """`loss_type="simpo"` is SimPO only with cpo_alpha=0: the default 1 adds an NLL. simpo_gamma is gamma."""
    sums, lengths = cpo.ours()
    ours = simpo_loss(**sums, **lengths, beta=beta, gamma=gamma).mean()
    differ(cpo.theirs("simpo", beta=beta, simpo_gamma=gamma), ours)
    same(cpo.theirs("simpo", beta=beta, simpo_gamma=gamma, cpo_alpha=0.0), ours, cpo.model)


def test_simpo_without_length_normalization(cpo):
    """The sums with the same beta: TRL's `sigmoid` on sums, once gamma is 0."""
    sums, lengths = cpo.ours()
    ours = simpo_loss(**sums, **lengths, beta=0.3, gamma=0.0, length_normalize=False).mean()
    same(cpo.theirs("sigmoid", beta=0.3, cpo_alpha=0.0), ours, cpo.model)


def test_slic_hf(cpo):
    """CPO's `hinge` is beta times SLiC-HF's with delta = 1 / beta."""
    sums, _ = cpo.ours()
    ours = 0.2 * slic_hf_loss(**sums, delta=5.0, nll_weight=0.0).mean()
    same(cpo.theirs("hinge", beta=0.2, cpo_alpha=0.0), ours, cpo.model)


# --- trl.experimental.orpo ---


@pytest.mark.parametrize("pairs", [PAIRS, EVEN_PAIRS], ids=["pairs", "even pairs"])
def test_orpo(tokenizer, tmp_path, pairs):
    """TRL's NLL covers prompt and response, a mean over tokens of the micro-batch; ours the response alone.

    With prompts of one token, which nothing predicts, and chosen responses of one length, they are the same.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy = tiny_gpt2(0)
    trainer = ORPOTrainer(
        model=policy, args=ORPOConfig(**settings(tmp_path, beta=0.25)), processing_class=tokenizer,
        train_dataset=rows(pairs),
    )  # fmt: skip
    batch = first_batch(trainer)
    theirs = trainer.compute_loss(policy, batch)
    sums, lengths = paired(policy, batch)
    ours = orpo_loss(**sums, **lengths, weight=0.25).mean()
    if pairs is EVEN_PAIRS:
        same(theirs, ours, policy)
        return
    differ(theirs, ours)
    ids, attention = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    kept = attention[:, 1:].bool()
    their_nll = -token_logps(policy(ids, attention_mask=attention).logits, ids)[kept].mean()
    our_nll = sft_loss(sums["chosen_logps"], lengths["chosen_lengths"]).mean()
    same(theirs, ours - our_nll + their_nll, policy)


def test_log1mexp():
    """Same values; but TRL's gradient is NaN once e^x rounds to 1: `where` gives infinity times 0."""
    from trl.experimental.orpo.orpo_trainer import log1mexp as theirs

    x = -torch.logspace(-12, 2, 300, dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), theirs(x), rtol=1e-13, atol=0)
    x = torch.tensor([-1e-9, -1.0], requires_grad=True)
    assert gradient(theirs(x).sum(), x)[0].isnan().tolist() == [True, False]
    torch.testing.assert_close(gradient(log1mexp(x).sum(), x)[0], torch.tensor([-1e9, -0.5819767]))


# --- reward model and policy gradient: the loss methods alone, on a stand-in for the trainer ---


def stand_in(**attributes):
    accelerator = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    metrics = defaultdict(lambda: defaultdict(list))
    model = SimpleNamespace(training=False)
    return SimpleNamespace(accelerator=accelerator, _metrics=metrics, model=model, **attributes)


def test_reward_pair():
    from trl import RewardTrainer

    rewards = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.4, -2.0], requires_grad=True)  # chosen, then rejected
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=None), _total_train_tokens=0)
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), {})
    ours = reward_pair_loss(*rewards.chunk(2)).mean()
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(gradient(theirs, rewards), gradient(ours, rewards))


def test_ppo_policy_loss_and_k3():
    """TRL 1.16 has no PPO any more; GRPO kept its clipped loss per token, plus beta times k3."""
    from trl import GRPOTrainer

    generator = torch.Generator().manual_seed(0)
    logps, old, ref, advantages = torch.randn(4, 3, 5, generator=generator)
    logps = (0.4 * logps - 2).requires_grad_()
    old, ref = logps.detach() + 0.4 * old, logps.detach() + 0.4 * ref
    mask = torch.arange(5)[None, :] < torch.tensor([5, 3, 2])[:, None]
    inputs = {
        "prompt_ids": torch.ones(3, 2).long(), "prompt_mask": torch.ones(3, 2).long(),
        "completion_ids": torch.ones(3, 5).long(), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
    }  # fmt: skip
    for beta in (0.0, 0.3):
        trainer = stand_in(
            _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None), beta=beta, loss_type="bnpo",
            importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
            _entropy_bonus_enabled=False,
        )  # fmt: skip
        theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
        ours = ppo_policy_loss(logps, old, advantages, clip=0.2) + beta * kl_estimates(logps, ref)["k3"]
        ours = ours[mask].mean()
        torch.testing.assert_close(theirs, ours)
        (got,), (want,) = gradient(ours, logps), gradient(theirs, logps)
        torch.testing.assert_close(got, want)
        if beta == 0:
            assert (got[mask] == 0).any() and (got[mask] != 0).any()  # some tokens are clipped, some are not
