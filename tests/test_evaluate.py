"""What a policy is worth: KL, Best-of-N, margins against length, win rates."""

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_edu.evaluate import (
    best_of_n,
    best_of_n_distribution,
    evaluate_policy,
    length_tables,
    mean_and_error,
    reward_on_curve,
    sequence_kl,
    spearman,
    tilted_frontier,
    win_rate,
)
from rlhf_edu.pairs import TokenPairs
from rlhf_edu.sampling import sample
from rlhf_edu.tokens import encode


@pytest.fixture
def prompts(tokenizer):
    return encode(tokenizer, ["The film", "This movie was", "The plot", "Her", "His music was so"])


@pytest.fixture
def moved(trained_policy):
    """The trained policy, somewhat disturbed: a few nats away."""
    policy, generator = copy.deepcopy(trained_policy), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return policy


# --- KL ---------------------------------------------------------------------------------------------------------


def test_kl_of_the_reference_with_itself_is_exactly_0(trained_policy, tokenizer, prompts):
    twin = copy.deepcopy(trained_policy)
    responses = sample(trained_policy, prompts * 4, eos_id=tokenizer.eos_token_id, max_tokens=10)
    for reference in (trained_policy, twin):
        exact, sampled = sequence_kl(
            trained_policy, reference, prompts * 4, responses, tokenizer.pad_token_id
        )
        assert exact.tolist() == [0.0] * 20 == sampled.tolist()


def test_kl_from_the_definition(trained_policy, moved, tokenizer, prompts):
    """Of each sequence alone: sum over its steps of sum over words of p log(p / q), and of the drawn word's log(p / q)."""
    responses = sample(moved, prompts * 4, eos_id=tokenizer.eos_token_id, max_tokens=10)
    exact, sampled = sequence_kl(
        moved, trained_policy, prompts * 4, responses, tokenizer.pad_token_id, batch_size=7
    )
    assert len({len(r) for r in responses}) > 1
    for i, (prompt, response) in enumerate(zip(prompts * 4, responses, strict=True)):
        steps = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response]])
            p, q = (m(ids).logits[0, steps].double().log_softmax(-1) for m in (moved, trained_policy))
        assert exact[i] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)
        drawn = (p - q)[range(len(response)), response]
        assert sampled[i] == pytest.approx(drawn.sum().item(), abs=1e-4)
        assert exact[i] > 0
    assert (sampled < 0).any(), "a sampled log-ratio can be negative, its mean cannot"


def test_both_estimates_agree_in_expectation(trained_policy, moved, tokenizer, prompts):
    """A z-test on the difference over 1,500 responses; the exact one must be the calmer."""
    many = prompts * 300
    responses = sample(moved, many, eos_id=tokenizer.eos_token_id, max_tokens=8, seed=3)
    exact, sampled = sequence_kl(moved, trained_policy, many, responses, tokenizer.pad_token_id)
    difference, error = mean_and_error(exact - sampled)
    assert abs(difference) < 3.5 * error
    assert exact.mean() > 20 * error, "the KL is too small for the test to tell"
    assert exact.std() < 0.8 * sampled.std()


def test_it_is_the_kl_of_the_policy_from_the_reference(trained_policy, policy, tokenizer, prompts):
    """Not the other way round: two very different values when one of the two is nearly uniform."""
    rows = prompts[:1] * 2
    with torch.no_grad():
        p, q = (
            m(torch.tensor(prompts[:1])).logits[0, -1].double().log_softmax(-1)
            for m in (trained_policy, policy)
        )
    forward, backward = ((a.exp() * (a - b)).sum().item() for a, b in ((p, q), (q, p)))
    exact, _ = sequence_kl(trained_policy, policy, rows, [[5], [6]], tokenizer.pad_token_id)
    assert exact.tolist() == pytest.approx([forward] * 2, abs=1e-4)
    assert abs(forward - backward) > 0.5


def test_evaluation_of_the_reference_itself(trained_policy, tokenizer, prompts):
    """KL 0 with error 0; reward, length and share of ends are those of its samples."""
    eos = tokenizer.eos_token_id

    def score(prompts, responses):
        return np.array([len(r) / 10 for r in responses])

    row = evaluate_policy(
        trained_policy,
        copy.deepcopy(trained_policy),
        prompts * 8,
        score,
        tokenizer=tokenizer,
        seed=4,
        max_tokens=12,
    )
    responses = sample(trained_policy, prompts * 8, eos_id=eos, max_tokens=12, seed=4)
    lengths = np.array([len(r) for r in responses])
    assert (row["kl"], row["kl_se"], row["kl_sampled"]) == (0.0, 0.0, 0.0)
    assert row["reward"] == pytest.approx(lengths.mean() / 10)
    assert row["reward_se"] == pytest.approx(lengths.std(ddof=1) / 10 / math.sqrt(40))
    assert row["length"] == lengths.mean()
    assert row["ended"] == np.mean([r[-1] == eos for r in responses]) and 0 < row["ended"] < 1
    assert row["prompts"] == 40


def test_evaluation_follows_the_seed(trained_policy, moved, tokenizer, prompts):
    def score(prompts, responses):
        return np.array([sum(r) for r in responses])

    first, again, other = (
        evaluate_policy(moved, trained_policy, prompts, score, tokenizer=tokenizer, seed=s, max_tokens=6)
        for s in (1, 1, 2)
    )
    assert first == again != other


def test_mean_and_error_by_hand():
    assert mean_and_error([1, 2, 3, 6]) == (3.0, pytest.approx(math.sqrt(14 / 3) / 2))
    mean, error = mean_and_error([2.5])
    assert mean == 2.5 and math.isnan(error)


# --- Best-of-N --------------------------------------------------------------------------------------------------


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = np.random.default_rng(0).random((5, 7))
    rewards[1, 3] = rewards[1, 4]  # a tie changes nothing
    table = best_of_n(rewards, range(1, 8))
    for n, reward, error in table[["n", "reward", "reward_se"]].itertuples(index=False):
        by_prompt = [np.mean([max(s) for s in itertools.combinations(row, n)]) for row in rewards]
        assert reward == pytest.approx(np.mean(by_prompt), abs=1e-12)
        assert error == pytest.approx(np.std(by_prompt, ddof=1) / math.sqrt(5), abs=1e-12)
    assert table["reward"].is_monotonic_increasing


def test_best_of_n_kl_bound():
    table = best_of_n(np.zeros((2, 128)), [1, 2, 128]).set_index("n")
    assert table.loc[1, "kl"] == 0
    assert table.loc[2, "kl"] == pytest.approx(math.log(2) - 0.5)
    assert table.loc[128, "kl"] == pytest.approx(math.log(128) - 127 / 128)


def test_best_of_n_bound_is_exact_without_ties():
    """Best of 3 of four equally likely responses with different rewards: tabulated, it stays under the bound."""
    n, k = 3, 400
    p_max = np.diff((np.arange(k + 1) / k) ** n)
    kl = (p_max * np.log(p_max * k)).sum()
    assert best_of_n(np.zeros((1, 3)), [n])["kl"][0] == pytest.approx(kl, abs=0.01)


def test_too_few_samples_are_explained(one_sentence):
    with one_sentence("Best-of-8", "8 samples", "there are 4"):
        best_of_n(np.zeros((3, 4)), [1, 8])


# --- length and win rates ---------------------------------------------------------------------------------------


def test_length_tables_by_hand(trained_policy, tokenizer):
    """Two pairs of one prompt; the reward is made of all three arguments, so that a swap would show."""
    prompt, responses = [5, 6], [[7, 8, 9, 0], [10, 0], [11, 12, 0]]
    pairs = TokenPairs([prompt] * 3, responses, np.array([0, 1]), np.array([1, 2]), [(0, 2)])
    with torch.no_grad():
        sums = []
        for r in responses:
            logps = trained_policy(torch.tensor([[*prompt, *r]])).logits[0, 1:-1].log_softmax(-1)
            sums.append(logps[range(len(r)), r].sum().item())
    reference = torch.tensor([1.0, 20.0, 300.0])
    margins, table = length_tables(
        trained_policy,
        reference,
        pairs,
        tokenizer.pad_token_id,
        reward=lambda s, n, ref: s + 1e3 * n + 1e5 * ref,
    )
    rewards = [s + 1e3 * n + 1e5 * ref for s, n, ref in zip(sums, (4, 2, 3), (1, 20, 300), strict=True)]
    assert margins["length_difference"].tolist() == [2, -1]
    assert margins["margin"].tolist() == pytest.approx(
        [rewards[0] - rewards[1], rewards[1] - rewards[2]], abs=1e-3
    )
    assert table["length"].tolist() == [4, 2, 3]
    assert table["logp_sum"].tolist() == pytest.approx(sums, abs=1e-4)
    assert table["logp_per_token"].tolist() == pytest.approx(
        [sums[0] / 4, sums[1] / 2, sums[2] / 3], abs=1e-4
    )


def test_spearman_sees_order_alone():
    table = pd.DataFrame(
        {"length": [1, 2, 3, 40], "logp_per_token": [-9.0, -8.0, -1.0, -0.5], "b": [4, 3, 2, 1]}
    )
    assert spearman(table) == pytest.approx(1)
    assert spearman(table, y="b") == pytest.approx(-1)


def test_win_rate_is_in_percent():
    assert win_rate([1, 0, 0.5, 1]) == 62.5
    assert win_rate(np.ones(3)) == 100.0


@pytest.mark.parametrize("bad", [[], [1.5, 0], [-1], [float("nan")]])
def test_bad_preferences_are_explained(bad, one_sentence):
    with one_sentence("from 0 (lost) to 1 (won)"):
        win_rate(bad)


# --- the frontier -----------------------------------------------------------------------------------------------


def test_best_of_n_chosen_by_another_score_is_the_mean_over_all_subsets():
    generator = np.random.default_rng(5)
    rewards, scores = generator.random((3, 6)), generator.random((3, 6))
    for row in best_of_n(rewards, [1, 2, 3, 6], choose_by=scores).itertuples():
        subsets = [list(s) for s in itertools.combinations(range(6), row.n)]
        found = [
            np.mean([r[s][np.argmax(z[s])] for s in subsets]) for r, z in zip(rewards, scores, strict=True)
        ]
        assert math.isclose(row.reward, np.mean(found))
    assert best_of_n(rewards, [2, 4], choose_by=rewards).equals(best_of_n(rewards, [2, 4]))


def test_best_of_n_distribution_by_all_draws():
    probabilities, rewards = np.array([0.1, 0.4, 0.2, 0.3]), np.array([2.0, 1.0, 2.0, 0.0])
    for n in (1, 2, 3, 4):
        expected = np.zeros(4)
        for draws in itertools.product(range(4), repeat=n):
            expected[draws[np.argmax(rewards[list(draws)])]] += probabilities[list(draws)].prod()
        assert np.allclose(best_of_n_distribution(probabilities, rewards, n), expected)


def test_tilted_frontier_is_the_optimum():
    """No other distribution has a higher reward minus beta times KL; samples in their shares give the same."""
    generator = np.random.default_rng(1)
    logps, rewards = generator.normal(size=(2, 5)), generator.random((2, 5))
    reference = np.exp(logps) / np.exp(logps).sum(1, keepdims=True)
    for row in tilted_frontier(rewards, [0.05, 0.3, 2.0], logps=logps).itertuples():
        for _ in range(200):
            p = generator.dirichlet(np.ones(5), size=2)
            kl = (p * np.log(p / reference)).sum(1).mean()
            assert (p * rewards).sum(1).mean() - row.beta * kl <= row.reward - row.beta * row.kl + 1e-12
    shares = tilted_frontier([[0.2, 0.2, 0.2, 0.9]], [0.5])
    assert np.allclose(
        shares, tilted_frontier([[0.2, 0.9]], [0.5], logps=np.log([[0.75, 0.25]])), equal_nan=True
    )


def test_reward_on_curve():
    kl, reward = [0.0, 4.0, 2.0], [0.5, 0.9, 0.6]
    assert [reward_on_curve(kl, reward, x) for x in (0, 1, 2, 3, 4)] == pytest.approx(
        [0.5, 0.55, 0.6, 0.75, 0.9]
    )
    assert math.isnan(reward_on_curve(kl, reward, 4.1)) and math.isnan(reward_on_curve(kl, reward, -0.1))
