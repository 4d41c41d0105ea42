"""GAE, KL estimates, whitening and the adaptive KL coefficient: numbers on paper, definitions, limits."""

import math

import pytest
import torch

from rlhf_edu.advantages import AdaptiveKL, gae, kl_estimates, whiten


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


REWARDS, VALUES = f64([-0.1, 0.05, 0.0, 1.0]), f64([0.2, 0.3, 0.1, 0.5])


def test_gae_by_hand():
    """gamma 1, lambda .95: deltas r_t + V_{t+1} - V_t are 0, -.15, .4, .5, then A_t = delta_t + .95 A_{t+1}.

    A = [0 + .95 * .68125, -.15 + .95 * .875, .4 + .95 * .5, .5] = [.6471875, .68125, .875, .5]
    """
    advantages, returns = gae(REWARDS, VALUES, gamma=1.0, lam=0.95)
    assert advantages.tolist() == pytest.approx([0.6471875, 0.68125, 0.875, 0.5])
    assert returns.tolist() == pytest.approx([0.8471875, 0.98125, 0.975, 1.0])
    assert advantages.dtype == torch.float64
    assert gae(REWARDS, VALUES)[0].tolist() == advantages.tolist()  # those are the defaults


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.7, 1.0)])
def test_gae_against_its_definition(gamma, lam):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, a double loop on Python floats, row by row."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam)
    for i in range(3):
        r, v = rewards[i].tolist(), values[i].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(7)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(7 - t)) for t in range(7)]
        assert advantages[i].tolist() == pytest.approx(expected)
        assert returns[i].tolist() == pytest.approx([a + b for a, b in zip(expected, v[:7], strict=True)])


def test_gae_limits():
    """lambda 1: advantage + value is the reward to come, whatever the critic says. lambda 0: the TD error."""
    to_come = f64([0.95, 1.05, 1.0, 1.0])
    torch.testing.assert_close(gae(REWARDS, VALUES, lam=1.0)[1], to_come)
    torch.testing.assert_close(gae(REWARDS, -3 * VALUES, lam=1.0)[1], to_come)
    torch.testing.assert_close(gae(REWARDS, VALUES, lam=0.0)[0], f64([0.0, -0.15, 0.4, 0.5]))


def test_gae_with_padding():
    """Rows of 4, 2 and 1 tokens padded with garbage: each as if alone, and 0 in the padding."""
    lengths = [4, 2, 1]
    mask = torch.arange(4)[None, :] < torch.tensor(lengths)[:, None]
    rewards = torch.where(mask, REWARDS, f64(5.0))
    values = torch.where(mask, VALUES, f64(math.nan))
    advantages, returns = gae(rewards, values, mask=mask, gamma=0.9)
    for i, n in enumerate(lengths):
        alone = gae(REWARDS[:n], VALUES[:n], gamma=0.9)
        torch.testing.assert_close(advantages[i, :n], alone[0])
        torch.testing.assert_close(returns[i, :n], alone[1])
        assert advantages[i, n:].tolist() == returns[i, n:].tolist() == [0.0] * (4 - n)
    torch.testing.assert_close(gae(rewards, values, mask=mask.long(), gamma=0.9)[0], advantages)


def test_gae_results_are_targets():
    values = VALUES.clone().requires_grad_()
    advantages, returns = gae(REWARDS, values)
    assert not advantages.requires_grad and not returns.requires_grad
    assert torch.equal(values, VALUES)


def test_gae_telescopes():
    """A potential added to the values, its differences taken from the rewards: the same advantages."""
    potential = f64([0.7, -0.2, 0.4, 1.1])
    shaping = torch.cat([potential[1:], f64([0.0])]) - potential
    torch.testing.assert_close(gae(REWARDS - shaping, VALUES + potential)[0], gae(REWARDS, VALUES)[0])


# --- KL ---

POLICY, REFERENCE = f64([0.5, 0.3, 0.15, 0.05]), f64([0.25, 0.25, 0.25, 0.25])


def expectation(estimates, probabilities):
    return {name: (probabilities * x).sum().item() for name, x in estimates.items()}


def test_kl_estimates_by_hand():
    """log pi = -1, log ref = -1.5, x = .5: k1 = .5, k2 = .125, k3 = e^-.5 - 1 + .5 = .106531."""
    estimates = kl_estimates(f64([-1.0]), f64([-1.5]))
    assert {k: v.item() for k, v in estimates.items()} == pytest.approx(
        {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}
    )
    # the other way round k1 is negative, k3 is not: e^.5 - 1 - .5; the wrong sign, e^x - 1 - x, gives .1065
    assert kl_estimates(f64([-1.5]), f64([-1.0]))["k3"].item() == pytest.approx(0.148721, abs=5e-7)


def test_kl_expectations_are_exact():
    """Over the exact distribution k1 and k3 have mean KL(policy || reference); k2 has not, being biased."""
    kl = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    mean = expectation(kl_estimates(POLICY.log(), REFERENCE.log()), POLICY)
    assert mean["k1"] == pytest.approx(kl, rel=1e-12)
    assert mean["k3"] == pytest.approx(kl, rel=1e-12)
    assert abs(mean["k2"] - kl) > 0.01
    # not the other KL: KL(reference || policy) differs
    reverse = sum(q * math.log(q / p) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    assert abs(reverse - kl) > 0.05


def test_kl_monte_carlo():
    """20,000 samples of the policy: k1 and k3 within 4 standard errors of the exact KL, k3 calmer than k1."""
    kl = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    sample = torch.multinomial(POLICY, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimates = kl_estimates(POLICY.log()[sample], REFERENCE.log()[sample])
    for name in ("k1", "k3"):
        error = estimates[name].std() / math.sqrt(len(sample))
        assert abs(estimates[name].mean() - kl) < 4 * error
    assert estimates["k3"].std() < estimates["k1"].std()
    assert (estimates["k1"] < 0).any() and (estimates["k3"] >= 0).all()


def test_k3_is_never_negative_in_float32():
    """Near 0 it is x^2 / 2, far below the rounding error of exp(-x) - 1 + x computed as written."""
    x = torch.logspace(-12, 1, 2000)
    for sign in (1, -1):
        assert (kl_estimates(sign * x, torch.zeros_like(x))["k3"] >= 0).all()
    small = torch.full((3,), 1e-3)
    torch.testing.assert_close(kl_estimates(small, 0 * small)["k3"], small**2 / 2, rtol=1e-3, atol=0)


def test_kl_gradients():
    """As a loss term, E[k2 gradient] is the gradient of KL(policy || reference); k1's expected gradient is 0.

    k3's is that of the other KL, -E_ref[grad log pi]. Expectations are exact here, over four words; no
    gradient flows through the probabilities of the samples, as none does through samples.
    """
    logits = POLICY.log().requires_grad_()

    def gradient_of(loss):
        return torch.autograd.grad(loss, logits)[0]

    logps = torch.log_softmax(logits, 0)
    exact = gradient_of((logps.exp() * (logps - REFERENCE.log())).sum())
    other = gradient_of((REFERENCE * (REFERENCE.log() - torch.log_softmax(logits, 0))).sum())
    got = {
        name: gradient_of((POLICY * kl_estimates(torch.log_softmax(logits, 0), REFERENCE.log())[name]).sum())
        for name in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(got["k1"], torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(got["k2"], exact)
    torch.testing.assert_close(got["k3"], other)


# --- whitening ---


def test_whiten_by_hand():
    """1, 2, 3, 6 under the mask: mean 3, biased variance (4 + 1 + 0 + 9) / 4 = 3.5. The rest is ignored."""
    values = f64([[1.0, 2.0, 100.0], [3.0, 6.0, math.nan]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    scale = 1 / math.sqrt(3.5 + 1e-8)
    expected = f64([[-2 * scale, -scale, 0.0], [0.0, 3 * scale, 0.0]])
    torch.testing.assert_close(whiten(values, mask), expected, rtol=1e-12, atol=1e-12)
    kept_mean = f64([[3 - 2 * scale, 3 - scale, 0.0], [3.0, 3 + 3 * scale, 0.0]])
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), kept_mean, rtol=1e-12, atol=1e-12)


def test_whiten_is_blind_to_shift_and_scale():
    values = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6)[None, :] < torch.tensor([6, 3, 1, 4])[:, None]
    whitened = whiten(values, mask)
    torch.testing.assert_close(whiten(5 * values - 2, mask), whitened, rtol=1e-6, atol=1e-6)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert whitened[mask].square().mean().item() == pytest.approx(1, rel=1e-6)
    assert (whitened[~mask] == 0).all()
    assert whiten(values, mask, shift_mean=False)[mask].mean().item() == pytest.approx(
        values[mask].mean().item()
    )


def test_whiten_of_constants_is_finite():
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# --- the adaptive coefficient ---


def test_adaptive_kl_by_hand():
    """KL 12 against 6: error 1, clipped to .2, times 512/10,000: .15 * 1.01024. KL 3: error -.5, clipped."""
    controller = AdaptiveKL(0.15, 6.0, 10_000)
    assert controller.update(12.0, 512) == pytest.approx(0.151536)
    assert controller.coefficient == pytest.approx(0.151536)
    assert AdaptiveKL(0.15, 6.0, 10_000).update(3.0, 512) == pytest.approx(0.148464)
    # inside the clip: 6.6 / 6 - 1 = .1
    assert AdaptiveKL(0.15, 6.0, 10_000).update(6.6, 512) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))


def test_adaptive_kl_accumulates_and_rests_at_its_target():
    controller = AdaptiveKL(coefficient=0.2, target=6.0, horizon=1000)
    assert controller.update(torch.tensor(6.0), 100) == 0.2
    for _ in range(3):
        controller.update(60.0, 100)
    assert controller.coefficient == pytest.approx(0.2 * 1.02**3)
    assert isinstance(controller.coefficient, float)
    # 20% at most, whatever the steps
    assert AdaptiveKL(0.2, 6.0, 500).update(1.0, 10_000) == pytest.approx(0.16)


def test_mistakes_get_one_sentence():
    mistakes = [
        (lambda: gae(REWARDS, VALUES[:2]), ("gae", "(4,)", "(2,)")),
        (lambda: gae(REWARDS, VALUES, mask=torch.ones(3)), ("gae", "(3,)")),
        (lambda: kl_estimates(REWARDS, VALUES[:2]), ("kl_estimates", "(2,)")),
        (lambda: whiten(VALUES, torch.zeros(4)), ("whiten", "at least one")),
        (lambda: whiten(VALUES, torch.ones(3)), ("whiten", "(3,)")),
        (lambda: AdaptiveKL(0.15, 0.0, 10_000), ("AdaptiveKL", "positive")),
        (lambda: AdaptiveKL(-0.15, 6.0, 10_000), ("AdaptiveKL", "positive")),
        (lambda: AdaptiveKL(0.15, 6.0, 0), ("AdaptiveKL", "positive")),
    ]
    for call, words in mistakes:
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
