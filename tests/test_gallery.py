"""The bugs on purpose: the right recipe is right, each wrong one is wrong in the way it says, and runs show it."""

import dataclasses
import math
import types

import pandas as pd
import pytest
import torch

from rlhf_edu import gallery, losses, models, tokens
from rlhf_edu.advantages import whiten
from rlhf_edu.checks import truths11
from rlhf_edu.gallery import Recipe
from rlhf_edu.logprobs import all_logps

PROMPTS = ["The film", "Her acting was", "The plot"]
TEXTS = [" was great.", " moving to the end. I saw it twice.", " was weak."]


@pytest.fixture
def world(tokenizer, trained_policy):
    """What the runs ask of a lesson, on tiny models; the score is the share of even tokens."""
    score = lambda prompts, responses: (
        torch.tensor([sum(t % 2 == 0 for t in r) / len(r) for r in responses]).double().numpy()
    )
    sft = models.freeze(trained_policy)
    return types.SimpleNamespace(tokenizer=tokenizer, base=sft, sft=sft, true_score=score)


def sums_of(world, recipe, count=3):
    ids, mask = recipe.batch(world.tokenizer, PROMPTS[:count], TEXTS[:count])
    with torch.no_grad():
        return recipe.sums(world.sft, ids, mask)


def test_the_right_recipe_agrees_with_the_package(world):
    prompts = tokens.encode(world.tokenizer, PROMPTS)
    responses = tokens.encode_responses(world.tokenizer, TEXTS, max_tokens=48)
    expected = all_logps(world.sft, world.tokenizer.pad_token_id, prompts, responses)
    assert torch.allclose(sums_of(world, Recipe()).double(), expected, atol=1e-4)


def test_masks_hold_what_they_say(world):
    tokenizer = world.tokenizer
    ids, mask = Recipe().batch(tokenizer, PROMPTS, TEXTS)
    eos = tokenizer.eos_token_id
    assert all(row[m][-1] == eos for row, m in zip(ids, mask, strict=True))
    short, _ = Recipe(encode=gallery.encode_without_eos).batch(tokenizer, PROMPTS, TEXTS)
    assert not (short == eos).any()
    _, counted = Recipe(collate=gallery.collate_prompt_counted).batch(tokenizer, PROMPTS, TEXTS)
    assert (
        (counted.sum(1) > mask.sum(1)).all() and not counted[:, 0].any() and (counted | mask == counted).all()
    )
    _, padded = Recipe(collate=gallery.collate_padding_counted).batch(tokenizer, PROMPTS, TEXTS)
    assert padded[:, -1].all() and (padded.sum(1) > mask.sum(1)).any()
    hidden_ids, hidden = Recipe(collate=gallery.collate_pad_is_eos).batch(tokenizer, PROMPTS, TEXTS)
    assert (mask.sum(1) - hidden.sum(1) == 1).all() and not (hidden_ids == tokenizer.pad_token_id).any()
    twice, _ = Recipe(encode=gallery.encode_with_two_bos).batch(tokenizer, PROMPTS, TEXTS)
    assert (twice[:, :2] == tokenizer.bos_token_id).all() and (twice[:, 2] != tokenizer.bos_token_id).all()


def test_sums_not_shifted_and_means(world):
    right = sums_of(world, Recipe())
    lengths = Recipe().batch(world.tokenizer, PROMPTS, TEXTS)[1].sum(1)
    assert torch.allclose(sums_of(world, Recipe(sums=gallery.sums_are_means)) * lengths, right, atol=1e-4)
    assert (sums_of(world, Recipe(sums=gallery.sums_not_shifted)) - right).abs().min() > 0.1
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    bigram = lambda ids: types.SimpleNamespace(logits=table[ids])
    ids = torch.tensor([[2, last] for last in range(5)])
    only_last = torch.tensor([[False, True]] * 5)
    assert math.isclose(gallery.sums(bigram, ids, only_last).exp().sum().item(), 1.0, abs_tol=1e-5)
    assert abs(gallery.sums_not_shifted(bigram, ids, only_last).exp().sum().item() - 1.0) > 0.05


def test_references(world):
    frozen = gallery.frozen_copy(world.sft)
    assert frozen is not world.sft and not frozen.training
    ids, mask = Recipe().batch(world.tokenizer, PROMPTS, TEXTS)
    noisy = gallery.reference_in_train_mode(world.sft)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(gallery.sums(frozen, ids, mask), gallery.sums(frozen, ids, mask))
        assert not torch.allclose(gallery.sums(noisy, ids, mask), gallery.sums(noisy, ids, mask))


def test_rewards_of_tokens():
    mask = torch.arange(5)[None] < torch.tensor([2, 5])[:, None]
    scores = torch.tensor([1.5, -2.0])
    assert gallery.place(scores, mask).tolist() == [[0, 1.5, 0, 0, 0], [0, 0, 0, 0, -2.0]]
    past = gallery.place_one_past(scores, mask)
    assert not (past * mask).any() and past[0, 2] == 1.5
    placed = gallery.place(scores, mask)
    assert torch.equal(Recipe().scale(placed, mask), placed)
    assert whiten(placed, mask)[mask & (placed == 0)].abs().min() > 0.01


PAIRS = [{"prompt": "The film", "chosen": " was great.", "rejected": " was awful and weak."}] * 2 + [
    {"prompt": "The plot", "chosen": " was lovely.", "rejected": " was boring. We left early."}
]
DPO = {"batch_size": 3, "steps": 3, "learning_rate": 3e-3}


def test_runs_of_pairs_log_what_the_recipe_computes_and_measure_what_is(world):
    heldout = tokens.encode(world.tokenizer, ["The film", "His music"])
    run, policy = gallery.dpo_run(world, PAIRS, Recipe(), **DPO, heldout=heldout, looks=(0,), max_tokens=8)
    assert list(run["step"]) == [0, 1, 2, 3] and math.isclose(run["loss"][0], math.log(2), abs_tol=1e-5)
    assert run["margin"].iloc[-1] > 0 and run["loss"].iloc[-1] < run["loss"][0]
    assert list(run["kl"].notna()) == [True, False, False, True] and abs(run["kl"][0]) < 1e-5
    again, _ = gallery.dpo_run(world, PAIRS, Recipe(), **DPO, heldout=heldout, looks=(0,), max_tokens=8)
    pd.testing.assert_frame_equal(run, again)
    assert policy is not world.sft and not any(p.requires_grad for p in world.sft.parameters())


@pytest.mark.parametrize("bug", truths11.NAMED["dpo"])
def test_broken_runs_of_pairs(world, bug):
    right, _ = gallery.dpo_run(world, PAIRS, Recipe(), **DPO)
    run, _ = gallery.dpo_run(world, PAIRS, truths11.NAMED["dpo"][bug], **DPO)
    a, b = run.iloc[0], run.iloc[-1]
    at_log_2 = math.isclose(a["loss"], math.log(2), abs_tol=1e-5)
    assert at_log_2 == (bug != "train mode")
    if bug == "swapped":
        assert b["loss"] < a["loss"] and b["margin"] < 0
    if bug == "no frozen copy":
        assert run["margin"].abs().max() < 1e-5 and math.isclose(b["loss"], math.log(2), abs_tol=1e-5)
    if bug == "mean":
        assert 0 < b["margin"] < right["margin"].iloc[-1] / 2
    if bug == "tiny beta":
        assert b["margin"] > 0 and abs(b["loss"] - math.log(2)) < 0.05


def test_a_run_goes_on_after_nan(world):
    recipe = Recipe(loss=lambda w, l, ref_w, ref_l: losses.dpo_loss(w, l, ref_w, ref_l) * math.nan)
    run, policy = gallery.dpo_run(world, PAIRS, recipe, **DPO)
    assert run["loss"].isna().all() and torch.isnan(next(policy.parameters())).all()


def test_runs_of_sft_and_ppo(world):
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    run, _ = gallery.sft_run(world, rows, Recipe(), batch_size=3, steps=3, learning_rate=3e-3)
    assert run["loss"].iloc[-1] < run["loss"][0]
    prompts = tokens.encode(world.tokenizer, ["The film", "His music", "Her acting"])
    loop = {"episodes": 3, "steps": 2, "max_tokens": 6}
    run, _ = gallery.ppo_run(world, prompts, Recipe(), **loop)
    assert (
        abs(run["logged_kl"][0]) < 1e-4 and run["ratio_off"].max() < 1e-4 and run["score"].between(0, 1).all()
    )
    hot, _ = gallery.ppo_run(world, prompts, Recipe(scoring_temperature=1.0), **loop)
    assert hot["ratio_off"].min() > 1e-3
    flipped, _ = gallery.ppo_run(world, prompts, Recipe(penalty=torch.neg), **loop)
    assert math.isclose(flipped["score"][0], run["score"][0])


def test_the_letters_of_the_page_are_all_bugs_once_each():
    for family, named in truths11.NAMED.items():
        assert sorted(truths11.KEYS[family].values()) == sorted(named)
        for letter, recipe in truths11.blind(family).items():
            changed = [f.name for f in dataclasses.fields(Recipe) if getattr(recipe, f.name) != f.default]
            assert len(changed) == 1, f"{family} {letter} changes {changed}"
