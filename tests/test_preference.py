"""Training on comparisons: every loss of `losses`, a student's own, and what is said when it cannot work."""

import copy
import functools
import inspect
import math

import numpy as np
import pytest
import torch

from rlhf_edu import losses, preference
from rlhf_edu.logprobs import all_logps
from rlhf_edu.pairs import pair_batch, sequences_of, tokenize_pairs
from rlhf_edu.preference import GIVEN, split_pairs, train_preference
from rlhf_edu.training import TrainConfig

PAIR_LOSSES = {
    name: f
    for name, f in vars(losses).items()
    if name.endswith("_loss")
    and {p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty} <= GIVEN
}
ONE = TrainConfig(steps=1, learning_rate=1e-3)
FEW = TrainConfig(steps=3, learning_rate=1e-3)


class Untouchable:
    """A reference that must not be used."""

    def __getattr__(self, name):
        raise AssertionError(f"the reference was used: {name}")


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def alone(policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = policy(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")


# --- DPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit_reference", [False, True])
def test_dpo_starts_at_log_2(trained_policy, tokenizer, comparisons, explicit_reference):
    reference = copy.deepcopy(trained_policy) if explicit_reference else None
    metrics = train_preference(
        trained_policy, comparisons, tokenizer=tokenizer, config=FEW, reference=reference, batch_size=12
    )
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=5e-7)
    assert metrics["margin"][0] == pytest.approx(0, abs=1e-5)
    assert abs(metrics["loss"][2] - math.log(2)) > 1e-5, "nothing was trained"


def test_shared_responses_give_the_loss_and_gradient_of_pairs_one_by_one(
    trained_policy, policy, tokenizer, comparisons
):
    """Two losses that differ in what they ask for; the other side tokenizes and runs each response of each pair."""
    encode = functools.partial(ids_of, tokenizer)
    for loss, kwargs in ((losses.dpo_loss, {"beta": 0.3}), (losses.simpo_loss, {"beta": 2.0, "gamma": 0.5})):
        trained, plain = copy.deepcopy(trained_policy), copy.deepcopy(trained_policy)
        config = TrainConfig(steps=1, learning_rate=1e-3, max_grad_norm=1e9)
        metrics = train_preference(
            trained, comparisons, loss, tokenizer=tokenizer, config=config, reference=policy, loss_kwargs=kwargs,
            batch_size=len(comparisons),
        )  # fmt: skip
        total, right = 0.0, 0
        for row in comparisons:
            prompt = encode(row["prompt"])
            responses = [[*encode(row[side]), tokenizer.eos_token_id] for side in ("chosen", "rejected")]
            logps = [alone(plain, prompt, r)[None] for r in responses]
            with torch.no_grad():
                refs = [alone(policy, prompt, r)[None] for r in responses]
            lengths = [torch.tensor([len(r)]) for r in responses]
            per_pair = loss(*logps, *(refs if loss is losses.dpo_loss else lengths), **kwargs)
            total = total + per_pair.sum() / len(comparisons)
            base = refs if loss is losses.dpo_loss else (0, 0)
            right += bool(logps[0] - base[0] > logps[1] - base[1])
        total.backward()
        assert metrics["loss"][0] == pytest.approx(total.item(), abs=1e-5)
        assert metrics["accuracy"][0] == pytest.approx(right / len(comparisons))
        for p, q in zip(trained.parameters(), plain.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-5 * max(1.0, q.grad.abs().max().item())
        assert max(p.grad.abs().max() for p in trained.parameters()) > 1e-3


def test_each_response_is_computed_once(tokenizer, comparisons):
    pairs = tokenize_pairs(comparisons, tokenizer)
    assert (
        len(pairs) == 20 and len(pairs.responses) == 20
    )  # five prompts, two good and two bad responses each
    assert pairs.groups == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    rows = pair_batch(pairs, 0, 8, seed=0)
    assert len(rows) == 8 and set(rows // 4) == set((rows // 4).tolist()) and len(set(rows // 4)) == 2
    used, chosen, rejected = sequences_of(pairs, rows)
    assert len(used) == 8
    for row, c, r in zip(rows, chosen, rejected, strict=True):
        assert tokenizer.decode(pairs.responses[used[c]][:-1]) == comparisons[int(row)]["chosen"]
        assert tokenizer.decode(pairs.responses[used[r]][:-1]) == comparisons[int(row)]["rejected"]


@pytest.mark.parametrize("count, sizes", [(1, [8]), (2, [4, 4]), (3, [3, 3, 2]), (8, [1] * 8), (20, [1] * 8)])
def test_parts_keep_prompts_whole_while_they_can(tokenizer, comparisons, count, sizes):
    """A device that holds less than the pairs of one prompt gets them in parts."""
    pairs = tokenize_pairs(comparisons, tokenizer)
    rows = pair_batch(pairs, 0, 8, seed=0)
    parts = split_pairs(pairs, rows, count)
    assert [len(p) for p, _ in parts] == [n for _, n in parts] == sizes
    assert np.concatenate([p for p, _ in parts]).tolist() == (
        rows.tolist() if count != 2 else sorted(rows, key=lambda r: r // 4)
    )


def test_training_learns_the_preference(trained_policy, tokenizer, comparisons):
    """Accuracy on prompts that were trained on, and on one that was held out."""
    train, heldout = comparisons.select(range(16)), comparisons.select(range(16, 20))
    reference = copy.deepcopy(trained_policy)
    config = TrainConfig(steps=30, learning_rate=3e-3)
    metrics = train_preference(trained_policy, train, tokenizer=tokenizer, config=config, batch_size=16)
    assert metrics["accuracy"].iloc[-1] == 1.0
    assert metrics["margin"].iloc[-1] > 3 and metrics["loss"].iloc[-1] < 0.5
    pairs = tokenize_pairs(heldout, tokenizer)
    gain = all_logps(trained_policy, 1, pairs.prompts, pairs.responses)
    gain -= all_logps(reference, 1, pairs.prompts, pairs.responses)
    assert (gain[pairs.chosen] > gain[pairs.rejected]).all()


# --- every loss, and one's own ----------------------------------------------------------------------------------


def test_the_list_of_pair_losses_is_whole():
    assert len(PAIR_LOSSES) >= 11, sorted(PAIR_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_trains(trained_policy, tokenizer, comparisons, name):
    before = copy.deepcopy(trained_policy)
    metrics = train_preference(
        trained_policy, comparisons, PAIR_LOSSES[name], tokenizer=tokenizer, config=FEW, batch_size=20
    )
    assert metrics["step"].tolist() == [1, 2, 3]
    assert metrics[["loss", "grad_norm", "accuracy", "margin"]].map(math.isfinite).all(axis=None)
    assert metrics["loss"].iloc[-1] < metrics["loss"].iloc[0], "the loss of the same pairs must fall"
    assert any(
        not torch.equal(p, q) for p, q in zip(trained_policy.parameters(), before.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "name", [n for n, f in PAIR_LOSSES.items() if "ref_chosen_logps" not in inspect.signature(f).parameters]
)
def test_reference_free_losses_never_touch_the_reference(trained_policy, tokenizer, comparisons, name):
    train_preference(
        trained_policy,
        comparisons,
        PAIR_LOSSES[name],
        tokenizer=tokenizer,
        config=ONE,
        reference=Untouchable(),
    )


def test_losses_with_a_reference_do_touch_it(trained_policy, tokenizer, comparisons):
    with pytest.raises(AssertionError, match="the reference was used"):
        train_preference(
            trained_policy, comparisons, tokenizer=tokenizer, config=ONE, reference=Untouchable()
        )


def test_reference_log_probs_are_kept_from_run_to_run(trained_policy, policy, tokenizer, comparisons):
    cache, rest = {}, {"tokenizer": tokenizer, "config": ONE}
    first = train_preference(
        copy.deepcopy(trained_policy), comparisons, reference=policy, reference_cache=cache, **rest
    )
    again = train_preference(
        trained_policy, comparisons, reference=Untouchable(), reference_cache=cache, **rest
    )
    assert first["loss"].tolist() == again["loss"].tolist()
    assert abs(first["loss"][0] - math.log(2)) > 1e-3, "the reference was another model"


def test_own_function_equals_the_package(trained_policy, tokenizer, comparisons):
    def my_dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, strength):
        h = chosen_logps - rejected_logps - (ref_chosen_logps - ref_rejected_logps)
        return torch.log(1 + torch.exp(-strength * h))

    twin = copy.deepcopy(trained_policy)
    mine = train_preference(
        trained_policy, comparisons, my_dpo, tokenizer=tokenizer, config=FEW, loss_kwargs={"strength": 0.5}
    )
    theirs = train_preference(twin, comparisons, tokenizer=tokenizer, config=FEW, loss_kwargs={"beta": 0.5})
    assert mine["loss"].tolist() == pytest.approx(theirs["loss"].tolist(), abs=1e-5)


def test_own_function_gets_what_it_names(trained_policy, tokenizer, comparisons):
    """Lengths count EOS; a lambda, other keyword defaults and **kwargs are fine."""
    seen = {}

    def mine(chosen_lengths, rejected_logps, chosen_logps, *, scale=1.0, **options):
        seen.update(lengths=chosen_lengths.tolist(), shape=rejected_logps.shape, scale=scale, **options)
        return -chosen_logps / chosen_lengths

    train_preference(
        trained_policy, comparisons, mine, tokenizer=tokenizer, config=ONE, batch_size=20,
        loss_kwargs={"scale": 2.0, "name": "kept"},
    )  # fmt: skip
    expected = [len(tokenizer(r["chosen"], add_special_tokens=False)["input_ids"]) + 1 for r in comparisons]
    assert sorted(seen["lengths"]) == sorted(expected)
    assert seen["shape"] == (20,) and seen["scale"] == 2.0 and seen["name"] == "kept"
    train_preference(
        trained_policy, comparisons, lambda chosen_logps: -chosen_logps, tokenizer=tokenizer, config=ONE
    )


@pytest.mark.parametrize(
    "loss, kwargs, parts",
    [
        (lambda chosen_logps: -chosen_logps.mean(), {}, ["shape ()", "one value a pair", "no mean"]),
        (lambda chosen_logps: -chosen_logps[:, None], {}, ["shape (20, 1)", "shape (20,)"]),
        (lambda chosen_logps: -chosen_logps[1:], {}, ["shape (19,)"]),
        (lambda chosen_logps: 1.0, {}, ["a float"]),
        (lambda chosen_logps: None, {}, ["a NoneType"]),
        (lambda chosen_logps: -chosen_logps.detach(), {}, ["without gradient", "detach"]),
        (lambda chosen_logps, chosen_ids: -chosen_logps, {}, ["'chosen_ids'", "chosen_logps"]),
        (lambda chosen_logps: -chosen_logps, {"beta": 0.1}, ["no argument 'beta'", "chosen_logps"]),
        (lambda beta: beta, {"beta": 0.1}, ["no log-probs"]),
        (losses.simpo_loss, {"gama": 0.1}, ["simpo_loss", "'gama'", "gamma"]),
    ],
    ids=["mean", "column", "part", "float", "none", "detached", "unknown", "stray", "nothing", "typo"],
)
def test_what_is_wrong_with_a_loss_is_said(
    trained_policy, tokenizer, comparisons, one_sentence, loss, kwargs, parts
):
    before = copy.deepcopy(trained_policy)
    with one_sentence(*parts):
        train_preference(
            trained_policy,
            comparisons,
            loss,
            tokenizer=tokenizer,
            config=ONE,
            loss_kwargs=kwargs,
            batch_size=20,
        )
    for p, q in zip(trained_policy.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


# --- KTO's reference point --------------------------------------------------------------------------------------


def points(policy, tokenizer, comparisons, reference, **options) -> list[float]:
    """The reference points a KTO run sees."""
    seen = []

    def spy(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, reference_point=0.0):
        seen.append(float(reference_point))
        assert not getattr(reference_point, "requires_grad", False)
        return losses.kto_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            reference_point=reference_point,
        )

    train_preference(
        policy, comparisons, spy, tokenizer=tokenizer, reference=reference, batch_size=20, **options
    )
    return seen


def test_kto_point_is_0_where_policy_and_reference_agree(trained_policy, tokenizer, comparisons):
    (start, *rest) = points(trained_policy, tokenizer, comparisons, None, config=FEW)
    assert start == pytest.approx(0, abs=1e-5)
    assert all(p >= 0 for p in rest)


def test_kto_point_is_the_mean_log_ratio_of_mismatched_pairs(trained_policy, policy, tokenizer, comparisons):
    (point,) = points(copy.deepcopy(trained_policy), tokenizer, comparisons, policy, config=ONE)
    encode = functools.partial(ids_of, tokenizer)
    ratios = []
    for i, row in enumerate(comparisons):
        other = comparisons[(i // 4 * 4 + 4) % 20]["chosen"]  # the next prompt's first chosen response
        ids = encode(row["prompt"]), [*encode(other), tokenizer.eos_token_id]
        with torch.no_grad():
            ratios.append((alone(trained_policy, *ids) - alone(policy, *ids)).item())
    assert point > 1
    assert point == pytest.approx(sum(ratios) / len(ratios), abs=1e-3)


def test_kto_point_is_never_negative(policy, trained_policy, tokenizer, comparisons):
    """A random policy is far below a trained reference: the log-ratio is negative, the point 0."""
    assert points(policy, tokenizer, comparisons, trained_policy, config=ONE) == [0.0]


def test_kto_point_can_be_given(trained_policy, tokenizer, comparisons):
    given = points(
        trained_policy, tokenizer, comparisons, None, config=ONE, loss_kwargs={"reference_point": 1.5}
    )
    assert given == [1.5]


def test_mismatched_responses_belong_to_another_prompt(tokenizer, comparisons):
    pairs = tokenize_pairs(comparisons, tokenizer)
    prompts, responses = preference.mismatched(pairs, seed=0)
    own = {(tuple(p), tuple(r)) for p, r in zip(pairs.prompts, pairs.responses, strict=True)}
    assert len(prompts) == len(responses) == len(pairs)
    for prompt, response, pair in zip(prompts, responses, range(len(pairs)), strict=True):
        assert prompt == pairs.prompts[pairs.chosen[pair]]
        owners = {p for p, r in own if r == tuple(response)}
        assert len(owners) == 1 and tuple(prompt) not in owners, (
            "this response was written for the same prompt"
        )


# --- comparisons ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_missing_column_is_explained(policy, tokenizer, comparisons, one_sentence, column):
    with one_sentence(f"lack the column {column!r}", "prompt, chosen and rejected"):
        train_preference(policy, comparisons.remove_columns(column), tokenizer=tokenizer, config=ONE)


def test_bad_comparisons_are_explained(policy, tokenizer, comparisons, one_sentence):
    with one_sentence("empty"):
        train_preference(policy, comparisons.select([]), tokenizer=tokenizer, config=ONE)
    blank = comparisons.map(lambda row: {"prompt": ""})
    with one_sentence("empty prompt"):
        train_preference(policy, blank, tokenizer=tokenizer, config=ONE)


def test_long_responses_are_cut(policy, tokenizer, comparisons):
    pairs = tokenize_pairs(comparisons, tokenizer, max_tokens=5, max_prompt=2)
    assert {len(r) for r in pairs.responses} <= set(range(1, 6)) and max(map(len, pairs.responses)) == 5
    assert {len(p) for p in pairs.prompts} == {2}
    whole = tokenize_pairs(comparisons, tokenizer)
    assert all(p == q[-2:] for p, q in zip(pairs.prompts, whole.prompts, strict=True)), (
        "a prompt keeps its end"
    )
