"""The TL;DR world: the grammar, its exact judge, the tokenizer, what ships and what was measured."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_edu import build_tldr, tldr
from rlhf_edu.errors import UserError
from rlhf_edu.tokens import encode
from rlhf_edu.training import rng

POSTS = {style: tldr.posts(60, 5, style) for style in tldr.STYLES}
some_post = st.builds(lambda style, n: POSTS[style][n], st.sampled_from(tldr.STYLES), st.integers(0, 59))


def score(post, summary):
    return tldr.judge_summary(post, summary)["score"]


def test_a_post_states_its_facts_and_no_phrase_belongs_to_two_slots():
    phrases = [phrase.lower() for slot in tldr.SLOTS.values() for phrase in slot]
    assert len(phrases) == len(set(phrases))
    for style, posts in POSTS.items():
        for post in posts:
            assert set(post.facts.items()) <= tldr.statements(post.text)
            assert post.prompt == post.text + "\nTL;DR:"
            assert {"relation", "name", "action", "object", "request"} <= set(post.facts)
        assert 19 <= min(len(p.text.split()) for p in posts)
        assert max(len(p.text.split()) for p in posts) <= 100
        beside = [tldr.statements(p.text) - set(p.facts.items()) for p in posts]
        assert any(beside), f"{style}: no aside names anything"
    assert not any(tldr.statements(a) for style in tldr.STYLES for a in tldr.ASIDES[style][0])


def test_the_same_seed_writes_the_same_posts_whatever_the_count():
    assert tldr.posts(3, 5) == POSTS["forum"][:3]
    assert tldr.posts(3, 6) != POSTS["forum"][:3]
    assert tldr.reference_summary(POSTS["forum"][0], 1) == tldr.reference_summary(tldr.posts(1, 5)[0], 1)
    assert len({tldr.reference_summary(POSTS["forum"][0], seed) for seed in range(9)}) > 4
    with pytest.raises(UserError, match="style"):
        tldr.posts(1, style="poem")


@settings(max_examples=60, deadline=None)
@given(some_post, st.integers(0, 99))
def test_references_are_true_and_a_full_summary_beats_them_unless_they_are_full_and_shorter(post, seed):
    reference, full = tldr.reference_summary(post, seed), tldr.full_summary(post, seed)
    judged, best = tldr.judge_summary(post, reference), tldr.judge_summary(post, full)
    assert judged["faithful"] == best["faithful"] == best["covered"] == 1
    assert judged["invented"] == best["invented"] == 0
    assert judged["ended"] and best["ended"]
    assert best["score"] > judged["score"] or judged["covered"] == 1


@settings(max_examples=60, deadline=None)
@given(some_post, st.integers(0, 99), st.sampled_from(tldr.KEY), st.integers(0, 10**6))
def test_swapping_dropping_or_padding_lowers_the_score(post, seed, slot, pick):
    full = tldr.full_summary(post, seed)
    if slot in post.facts:
        wrong = [p for p in tldr.SLOTS[slot] if p != post.facts[slot]]
        swapped = full.replace(post.facts[slot], wrong[pick % len(wrong)])
        judged = tldr.judge_summary(post, swapped)
        assert judged["invented"] == 1 and judged["faithful"] < 1 and judged["covered"] < 1
        assert score(post, swapped) < score(post, full) - 0.2
        without = tldr.write_summary(
            post, [s for s in tldr.KEY if s in post.facts and s != slot] + ["object"] * (slot == "object"),
            rng(seed, 107),
        )  # fmt: skip
        assert slot == "object" or score(post, without) < score(post, full)
        assert score(post, full + " or " + wrong[0]) < score(post, full)  # naming two does not help
    padded = full + " " + tldr.ASIDES[post.style][0][pick % 6]
    assert score(post, padded) < score(post, full)
    assert score(post, full + " " + full) < score(post, full)  # nor does saying it twice


def test_the_score_is_the_documented_formula():
    facts = {
        "relation": "sister",
        "name": "Ida",
        "action": "sold",
        "object": "ring",
        "request": "move out",
        "age": "24",
    }
    post = tldr.Post("...", facts)
    judged = tldr.judge_summary(post, "My SISTER Ida, 24, sold my couch.")
    assert judged == {
        "faithful": 0.8, "covered": 0.6, "invented": 1, "words": 7, "ended": True, "score": (3 - 1) / 5 - 0.07,
    }  # fmt: skip
    assert tldr.judge_summary(post, "")["score"] == 0
    assert score(post, "Tom.") < 0 == score(post, "")
    assert tldr.statements("idaho 240 dollars, 40 dollars, carpet, a sold-out gym") == {
        ("amount", "40 dollars"), ("action", "sold"), ("place", "gym"),
    }  # fmt: skip
    assert tldr.scores([post] * 2, ["", "Tom."]).tolist() == [0, score(post, "Tom.")]


def test_tokens_round_trip_and_fit_the_context():
    tokenizer = tldr.tokenizer()
    assert tokenizer.get_vocab() == tldr.make_tokenizer().get_vocab()
    assert 200 < len(tokenizer) < 400 and tokenizer.pad_token_id != tokenizer.eos_token_id
    seen = {}
    for style in tldr.STYLES:
        posts = tldr.posts(400, 8, style)
        texts = [p.prompt for p in posts] + [tldr.reference_summary(p) for p in posts]
        ids = encode(tokenizer, texts)
        assert tokenizer.batch_decode(ids) == texts
        assert tokenizer.unk_token_id not in np.concatenate(ids)
        assert max(map(len, ids[:400])) + tldr.LONGEST_SUMMARY <= tldr.CONTEXT
        assert max(map(len, ids[400:])) < tldr.LONGEST_SUMMARY
        seen[style] = set(np.concatenate(ids))
    assert not seen["news"] - seen["forum"]  # the other grammar has other sentences, not other words
    prompt, summary = POSTS["forum"][0].prompt, tldr.full_summary(POSTS["forum"][0])
    joint = [i for part in encode(tokenizer, [prompt, summary]) for i in part]
    assert encode(tokenizer, [prompt + " " + summary])[0] == joint == encode(tokenizer, [prompt + summary])[0]
    assert tldr.dataset(2, 5)[1] == {
        "prompt": POSTS["forum"][1].prompt, "completion": tldr.reference_summary(POSTS["forum"][1], 5),
    }  # fmt: skip


# --- what is trained ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Everything that `build tldr` and `build tldr-results` do, tiny."""
    root = tmp_path_factory.mktemp("tldr")
    kwargs = {"work": root / "work", "threads": 1, "config": build_tldr.SMOKE}
    build_tldr.build(root / "models", **kwargs)
    build_tldr.results(root / "models", output=root / "results", seeds=(0,), **kwargs)
    return root


def test_the_build_makes_all_that_ships_and_does_nothing_twice(smoke, capsys):
    for name in ("sft", "reward", *build_tldr.METHODS):
        card = json.loads((smoke / "models" / name / "card.json").read_text())
        assert card["parameters"] > 0 and card["seconds"] >= 0 and "TL;DR" in card["what"]
    assert not list(smoke.rglob("*.run"))
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*") if p.is_file()}
    build_tldr.build(smoke / "models", work=smoke / "work", threads=1, config=build_tldr.SMOKE)
    assert capsys.readouterr().out.count("already at") == len(build_tldr.STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="other settings"):
        build_tldr.build(smoke / "models", ["ppo"], work=smoke / "work", threads=1)
    with pytest.raises(UserError, match="unknown stage"):
        build_tldr.build(smoke / "models", ["rlhf"])


def test_the_results_of_the_tiny_run_are_complete(smoke):
    check_results(smoke / "results", build_tldr.SMOKE, seeds=[0])
    shutil.rmtree(smoke / "work" / "dpo-seed0")  # as if interrupted: made again, and the same
    (smoke / "work" / "judge-dpo-seed0.csv").unlink()
    (smoke / "results" / "win_rates.csv").rename(smoke / "before.csv")
    build_tldr.results(
        smoke / "models", output=smoke / "results", seeds=(0,), work=smoke / "work", threads=1,
        config=build_tldr.SMOKE,
    )  # fmt: skip
    assert (smoke / "results" / "win_rates.csv").read_text() == (smoke / "before.csv").read_text()


def check_results(folder, config, seeds):
    wins, steps, best = (pd.read_csv(folder / f"{name}.csv") for name in build_tldr.COLUMNS)
    for name, table in zip(build_tldr.COLUMNS, (wins, steps, best), strict=True):
        assert list(table.columns) == build_tldr.COLUMNS[name]
        assert table.notna().all().all() and table["win"].between(0, 100).all()
    runs = {("sft", 0)} | {(m, s) for m in build_tldr.METHODS for s in seeds}
    keys = wins[["style", "policy", "seed", "temperature"]].itertuples(index=False, name=None)
    assert sorted(keys) == sorted(
        (style, m, s, t) for style in tldr.STYLES for m, s in runs for t in config.temperatures
    )
    assert (wins["win_low"] <= wins["win"]).all() and (wins["win"] <= wins["win_high"]).all()
    assert (wins["posts"] == config.test_posts).all() and (best["posts"] == config.best_of_posts).all()
    assert (steps.groupby(["policy", "seed"]).size() == config.watches + 1).all()
    assert set(steps[["policy", "seed"]].itertuples(index=False, name=None)) == runs - {("sft", 0)}
    assert (
        best.groupby("style")["n"].apply(list).tolist()
        == [[2**i for i in range(config.best_of.bit_length())]] * 2
    )
    run = json.loads((folder / "run.json").read_text())
    assert run["seeds"] == seeds and {"python", "torch", "transformers"} <= set(run["versions"])
    assert run["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert len(run["seconds"]) == 2 * len(runs) and min(run["seconds"].values()) >= 0


def test_a_win_rate_against_references_counts_ties_half():
    posts = POSTS["forum"][:4]
    references = [tldr.reference_summary(p) for p in posts]
    assert build_tldr.judged(posts, references)["win"] == 50
    assert build_tldr.judged(posts, [""] * 4)["win"] == 0
    assert build_tldr.wins(posts, np.full((4, 2), 9.0)).tolist() == [[1, 1]] * 4


def test_the_shipped_sft_policy_summarizes_this_post_and_not_another():
    policy, tokenizer = tldr.load("sft")
    texts = build_tldr.summarize(policy, tokenizer, POSTS["forum"][:32], temperature=0)
    assert np.mean([t.endswith((".", "?")) for t in texts]) > 0.9
    here = tldr.scores(POSTS["forum"][:32], texts)
    assert here.mean() > 0.25
    assert tldr.scores(POSTS["forum"][1:33], texts).mean() < 0  # chance: as summaries of the next post
