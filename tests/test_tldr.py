"""The TL;DR world: the grammar, its exact judge, the tokenizer, what ships and what was measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_edu import tldr
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
