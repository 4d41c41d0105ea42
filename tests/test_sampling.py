"""Samples: reproducible, ended by EOS, and distributed as the policy says."""

import math

import pytest
import torch
from scipy.stats import chisquare

from rlhf_edu import sampling
from rlhf_edu.sampling import choose, sample
from rlhf_edu.tokens import encode

TEXTS = [
    "The",
    "The film was",
    "This movie was funny to the",
    "Her acting",
    "His music was",
    "The plot was weak and",
]


@pytest.fixture
def prompts(tokenizer):
    return encode(tokenizer, TEXTS)


def fit(counts, expected) -> float:
    """p-value of Pearson's test; cells that expect fewer than 5 are merged."""
    counts, expected = torch.as_tensor(counts).double(), torch.as_tensor(expected).double()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def test_same_seed_same_responses_other_seed_others(trained_policy, tokenizer, prompts):
    first, again, other = (
        sample(trained_policy, prompts * 3, eos_id=tokenizer.eos_token_id, max_tokens=20, seed=seed)
        for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other
    assert first[: len(prompts)] != first[len(prompts) : 2 * len(prompts)], (
        "equal prompts must differ in their draws"
    )


def test_batches_draw_differently(trained_policy, tokenizer, prompts):
    eos = tokenizer.eos_token_id
    responses = sample(trained_policy, [prompts[0]] * 8, eos_id=eos, max_tokens=20, batch_size=4)
    assert responses[:4] != responses[4:]


def test_stops_at_eos_and_keeps_it(trained_policy, tokenizer, prompts):
    eos = tokenizer.eos_token_id
    responses = sample(trained_policy, prompts * 20, eos_id=eos, max_tokens=12)
    ended = [r for r in responses if eos in r]
    assert 0 < len(ended) < len(responses), "the test needs both kinds"
    assert all(r.index(eos) == len(r) - 1 for r in ended)
    assert all(len(r) == 12 for r in responses if eos not in r)


def test_greedy_equals_generate_of_transformers(trained_policy, tokenizer, prompts):
    """One batch of prompts of different lengths that end at different times; the other side one at a time."""
    eos = tokenizer.eos_token_id
    ours = sample(trained_policy, prompts, eos_id=eos, max_tokens=30, temperature=0)
    theirs = [
        trained_policy.generate(
            torch.tensor([p]),
            attention_mask=torch.ones(1, len(p), dtype=torch.long),
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    assert ours == theirs
    assert len({len(p) for p in prompts}) > 3
    assert len({len(r) for r in ours}) > 2, (
        "rows must finish at different times, so that some are dropped early"
    )


def test_greedy_of_a_batch_equals_one_at_a_time(policy, tokenizer, prompts):
    """A random policy has no habits that could hide a wrong position or a row mixed up."""
    eos = sample(policy, prompts[:1], eos_id=0, max_tokens=4, temperature=0)[0][3]  # a token that does come
    together = sample(policy, prompts, eos_id=eos, max_tokens=15, temperature=0)
    alone = [sample(policy, [p], eos_id=eos, max_tokens=15, temperature=0)[0] for p in prompts]
    assert together == alone


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_token_has_the_frequencies_of_the_softmax(trained_policy, tokenizer, prompts, temperature):
    n, prompt = 8000, prompts[1]
    # a longer neighbour in the batch: the prompt is padded, which must not change what follows it
    rows = [prompt] * n + [prompts[2]]
    drawn = sample(
        trained_policy,
        rows,
        eos_id=tokenizer.eos_token_id,
        max_tokens=1,
        temperature=temperature,
        batch_size=n + 1,
    )
    counts = torch.bincount(torch.tensor([r[0] for r in drawn[:n]]), minlength=len(tokenizer))
    with torch.no_grad():
        logits = trained_policy(torch.tensor([prompt])).logits[0, -1].double()
    assert fit(counts, n * (logits / temperature).softmax(-1)) > 1e-3
    assert fit(counts, n * (logits / (1.5 - temperature)).softmax(-1)) < 1e-9, "the test could not tell"


def test_first_two_tokens_have_the_joint_frequencies(trained_policy, tokenizer, prompts):
    """The second token is drawn through the cache, after other rows were dropped."""
    n, prompt, words = 8000, prompts[1], len(tokenizer)
    with torch.no_grad():
        logits = trained_policy(torch.tensor([[*prompt, w] for w in range(words)])).logits.double()
    first, second = logits[0, -2].log_softmax(-1), logits[:, -1].log_softmax(-1)
    stop = int(first.argmax())  # call the likeliest token the end: many rows stop at once
    drawn = sample(trained_policy, [prompt] * n, eos_id=stop, max_tokens=2, batch_size=n)
    assert all(len(r) == 1 for r in drawn if r[0] == stop)
    goes_on = [r for r in drawn if r[0] != stop]
    assert n / 8 < n - len(goes_on) < n, "some rows must go on, and enough must stop to be dropped"
    joint = (first[:, None] + second).exp()
    joint[stop] = 0
    counts = torch.bincount(torch.tensor([a * words + b for a, b in goes_on]), minlength=words * words)
    assert fit(counts, n * joint.flatten()) > 1e-3


@pytest.mark.parametrize("draw", [sampling.by_gumbel, sampling.by_cumulative])
def test_both_ways_to_draw_have_the_frequencies_of_the_softmax(draw):
    p = torch.tensor([0.0, 0.3, 1e-4, 0.0, 0.6, 0.0999, 0.0])
    drawn = draw(p.log().expand(50_000, 7), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=7)
    assert counts[p == 0].sum() == 0
    assert fit(counts[p > 0], 50_000 * p[p > 0]) > 1e-3


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_least_and_the_largest_random_number_name_a_token_that_can_come(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, number))
    logits = torch.tensor([0.0, 0.1, 0.2, 0.7, 0.0]).log()
    assert choose(logits[None], 1.0, 1.0, None).tolist() == [1 if number == 0 else 3]


def test_a_cache_with_room_gives_what_transformers_gives(policy, prompts):
    """Also after rows were dropped."""
    ids, keep = torch.tensor([p[:2] for p in prompts if len(p) > 1]), torch.tensor([2, 0])
    steps = [ids, ids[:, :1], ids[:, 1:]]
    outs = []
    for cache in (sampling.cache_for(policy, 4), sampling.DynamicCache(config=policy.config)):
        assert isinstance(cache.layers[0], sampling.RoomyLayer) == (not outs)
        with torch.no_grad():
            first = [policy(x, past_key_values=cache, use_cache=True).logits for x in steps[:2]]
            cache.batch_select_indices(keep)
            outs.append([*first, policy(steps[2][keep], past_key_values=cache, use_cache=True).logits])
        assert cache.get_seq_length() == 4
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_top_p_keeps_exactly_the_nucleus():
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]), (0.96, [0, 1, 2, 3])):
        drawn = choose(logits, 1.0, top_p, generator)
        assert sorted(set(drawn.tolist())) == kept, top_p
    counts = torch.bincount(choose(logits, 1.0, 0.79, generator), minlength=4)
    assert fit(counts[[1, 3]], [12_500, 7_500]) > 1e-3


def test_top_p_of_a_policy_at_a_temperature(trained_policy, tokenizer, prompts):
    """The nucleus is that of the tempered distribution, after the prompt that leaves most open."""
    with torch.no_grad():
        after = [(trained_policy(torch.tensor([p])).logits[0, -1] / 2.0).softmax(-1) for p in prompts]
    p, prompt = min(zip(after, prompts, strict=True), key=lambda pair: pair[0].max())
    ordered, order = p.sort(descending=True)
    nucleus = set(order[: int((ordered.cumsum(0) < 0.6).sum()) + 1].tolist())
    drawn = sample(
        trained_policy,
        [prompt] * 4000,
        eos_id=tokenizer.eos_token_id,
        max_tokens=1,
        temperature=2.0,
        top_p=0.6,
    )
    assert {r[0] for r in drawn} == nucleus
    assert 1 < len(nucleus) < len(tokenizer)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}],
)
def test_bad_settings_are_explained(policy, prompts, one_sentence, bad):
    with one_sentence(*bad):
        sample(policy, prompts, eos_id=0, **bad)


def test_bad_prompts_are_explained(policy, prompts, one_sentence):
    with one_sentence("empty prompt"):
        sample(policy, [prompts[0], []], eos_id=0)
    with one_sentence("64 tokens", "context of 64"):
        sample(policy, [prompts[0], [5] * 64], eos_id=0)


def test_context_limits_the_response(policy, prompts):
    responses = sample(policy, [[5] * 60, prompts[0]], eos_id=0, max_tokens=48, temperature=0)
    assert [len(r) for r in responses] == [4, 4]
    (last,) = sample(policy, [[5] * 63], eos_id=0, max_tokens=48, temperature=0)
    with torch.no_grad():
        assert last == [int(policy(torch.tensor([[5] * 63])).logits[0, -1].argmax())]


def test_policy_is_left_as_it_was(policy, prompts):
    for training in (True, False):
        policy.train(training)
        sample(policy, prompts, eos_id=0, max_tokens=3)
        assert policy.training is training
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())
    assert sample(policy, [], eos_id=0) == []
