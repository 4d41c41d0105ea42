"""Every loss against arithmetic on paper, its numeric gradient, an invariance, and what its paper says of it.

The expected numbers use Python's `math` and never the code under test. The pair of the worked examples is

    s_w = -6 over 12 tokens, s_l = -5.6 over 8   =>   a_w = -.5, a_l = -.7
    rho_w = -7, rho_l = -5                       =>   h = (-6 + 7) - (-5.6 + 5) = 1.6
"""

import inspect
import math
from decimal import Decimal, localcontext

import pytest
import torch

from rlhf_edu import losses
from rlhf_edu.losses import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log1mexp,
    orpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    preferred_ft_loss,
    rdpo_loss,
    reward_pair_loss,
    reward_ranking_loss,
    rrhf_loss,
    sft_loss,
    simpo_loss,
    slic_hf_loss,
    unlikelihood_loss,
)

LN2 = math.log(2)
PAIR = {"chosen_logps": -6.0, "rejected_logps": -5.6}
REF = {"ref_chosen_logps": -7.0, "ref_rejected_logps": -5.0}
LENGTHS = {"chosen_lengths": 12.0, "rejected_lengths": 8.0}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def one(loss, **arguments):
    """Call `loss` on a batch of one: floats of tensor arguments become (1,) tensors, the rest are knobs."""
    knobs = {k for k, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return loss(**{k: v if k in knobs else f64([v]) for k, v in arguments.items()}).item()


def softplus(x):
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def odds(logp):
    return math.exp(logp) / (1 - math.exp(logp))


BY_HAND = [
    (sft_loss, {"logps": -6.0, "lengths": 12.0}, {}, 0.5),
    (preferred_ft_loss, {"chosen_logps": -6.0}, {}, 6.0),
    # -(-6 - .5 * -5.6) = 6 - 2.8
    (unlikelihood_loss, PAIR, {"alpha": 0.5}, 3.2),
    # -log sigmoid(.5 * 1.6)
    (dpo_loss, PAIR | REF, {"beta": 0.5}, softplus(-0.8)),
    # .9 * -log sigmoid(.8) + .1 * -log sigmoid(-.8)
    (dpo_loss, PAIR | REF, {"beta": 0.5, "label_smoothing": 0.1}, 0.9 * softplus(-0.8) + 0.1 * softplus(0.8)),
    # (1.6 - 1 / (2 * .25))^2 = (-.4)^2
    (ipo_loss, PAIR | REF, {"tau": 0.25}, 0.16),
    # chosen: 2 (1 - sigmoid(.5 (1 - .4))) = 2 / (1 + e^.3);  rejected: 3 (1 - sigmoid(.5 (.4 + .6)))
    (
        kto_loss,
        PAIR | REF,
        {"beta": 0.5, "reference_point": 0.4, "desirable_weight": 2.0, "undesirable_weight": 3.0},
        2 / (1 + math.exp(0.3)) + 3 / (1 + math.exp(0.5)),
    ),
    # -log sigmoid(.5 * 1.6 + .1 * (12 - 8))
    (rdpo_loss, PAIR | REF | LENGTHS, {"beta": 0.5, "alpha": 0.1}, softplus(-1.2)),
    # -log sigmoid(.5 * -.4) + 2 * 6
    (cpo_loss, PAIR, {"beta": 0.5, "nll_weight": 2.0}, softplus(0.2) + 12),
    # max(0, 1.5 + 6 - 5.6) + 2 * 6
    (slic_hf_loss, PAIR, {"delta": 1.5, "nll_weight": 2.0}, 13.9),
    # max(0, .3 + 6 - 8) + .5 * 6: the margin is met
    (slic_hf_loss, PAIR | {"rejected_logps": -8.0}, {"delta": 0.3, "nll_weight": 0.5}, 3.0),
    # the means are in order (-.5 > -.7), so the hinge is 0 and 2 * 6 is left
    (rrhf_loss, PAIR | LENGTHS, {"nll_weight": 2.0}, 12.0),
    # roles swapped: max(0, -.5 + .7) + 2 * 5.6
    (
        rrhf_loss,
        {"chosen_logps": -5.6, "rejected_logps": -6.0, "chosen_lengths": 8.0, "rejected_lengths": 12.0},
        {"nll_weight": 2.0},
        11.4,
    ),
    # .5 + .25 * -log sigmoid(log(odds_w / odds_l)), and -log sigmoid(log r) = log(1 + 1/r)
    (orpo_loss, PAIR | LENGTHS, {"weight": 0.25}, 0.5 + 0.25 * math.log1p(odds(-0.7) / odds(-0.5))),
    # 2 (-.5 + .7) - 1 = -.6, -log sigmoid(-.6) = 1.0375
    (simpo_loss, PAIR | LENGTHS, {"beta": 2.0, "gamma": 1.0}, 1.0374879504858856),
    # without length normalization 2 (-6 + 5.6) - 1 = -1.8
    (simpo_loss, PAIR | LENGTHS, {"beta": 2.0, "gamma": 1.0, "length_normalize": False}, softplus(1.8)),
    (reward_pair_loss, {"chosen_rewards": 2.0, "rejected_rewards": 1.5}, {}, softplus(-0.5)),
    # rewards 2, 1, .5, -1: the six differences are 1, 1.5, 3, .5, 2, 1.5
    (
        reward_ranking_loss,
        {"rewards": [2.0, 1.0, 0.5, -1.0]},
        {},
        sum(softplus(-d) for d in (1, 1.5, 3, 0.5, 2, 1.5)) / 6,
    ),
    # ratio e^.1 = 1.105 is inside [.8, 1.2]
    (ppo_policy_loss, {"logps": -1.0, "old_logps": -1.1, "advantages": 2.0}, {}, -2 * math.exp(0.1)),
    # ratio e^.5 = 1.649: a good token is clipped at 1.2, a bad one is not
    (ppo_policy_loss, {"logps": -1.0, "old_logps": -1.5, "advantages": 2.0}, {}, -2.4),
    (ppo_policy_loss, {"logps": -1.0, "old_logps": -1.5, "advantages": -2.0}, {}, 2 * math.exp(0.5)),
    # ratio e^-.5 = .607: a bad token is clipped at .8, a good one is not
    (ppo_policy_loss, {"logps": -1.5, "old_logps": -1.0, "advantages": -2.0}, {}, 1.6),
    (ppo_policy_loss, {"logps": -1.5, "old_logps": -1.0, "advantages": 2.0}, {}, -2 * math.exp(-0.5)),
    (ppo_policy_loss, {"logps": -1.0, "old_logps": -1.5, "advantages": 2.0}, {"clip": 0.4}, -2.8),
    # moved from 1 to 1.5, clipped to 1.2: .5 max((1.5 - 2)^2, (1.2 - 2)^2)
    (ppo_value_loss, {"values": 1.5, "old_values": 1.0, "returns": 2.0}, {}, 0.32),
    # the same move away from the return: .5 max((1.5 - 0)^2, (1.2 - 0)^2)
    (ppo_value_loss, {"values": 1.5, "old_values": 1.0, "returns": 0.0}, {}, 1.125),
    # downwards, 1 to .5, clipped to .9 with clip .1: .5 max((.5 - 0)^2, (.9 - 0)^2)
    (ppo_value_loss, {"values": 0.5, "old_values": 1.0, "returns": 0.0}, {"clip": 0.1}, 0.405),
]


@pytest.mark.parametrize(
    "loss, arguments, knobs, expected", BY_HAND, ids=lambda x: getattr(x, "__name__", "")
)
def test_by_hand(loss, arguments, knobs, expected):
    assert one(loss, **arguments, **knobs) == pytest.approx(expected, rel=1e-12)


def test_published_numbers_of_the_worked_examples():
    """The figures the notebooks quote, so that a slip in `softplus` above cannot hide one in the code."""
    assert one(dpo_loss, **PAIR, **REF, beta=0.5) == pytest.approx(0.371101, abs=5e-7)
    assert one(reward_ranking_loss, rewards=[2.0, 1.0, 0.5, -1.0]) == pytest.approx(0.227613, abs=5e-7)
    assert one(simpo_loss, **PAIR, **LENGTHS) == pytest.approx(1.0375, abs=5e-5)


# A batch of three pairs for the tests of structure: no ties, nothing on the kink of a hinge or a clip.
BATCH = {
    "chosen_logps": f64([-6.0, -20.5, -9.0]),
    "rejected_logps": f64([-5.6, -13.0, -30.0]),
    "ref_chosen_logps": f64([-7.0, -19.0, -9.5]),
    "ref_rejected_logps": f64([-5.0, -13.5, -28.0]),
    "chosen_lengths": f64([12.0, 9.0, 4.0]),
    "rejected_lengths": f64([8.0, 15.0, 20.0]),
    "logps": f64([-1.0, -2.0, -0.4]),
    "lengths": f64([3.0, 5.0, 1.0]),
    "old_logps": f64([-1.5, -1.9, -0.3]),
    "advantages": f64([2.0, -1.0, 0.5]),
    "values": f64([1.5, 0.3, -1.0]),
    "old_values": f64([1.0, 0.2, -0.1]),
    "returns": f64([2.0, 1.0, 0.4]),
    "chosen_rewards": f64([1.0, -0.5, 3.0]),
    "rejected_rewards": f64([0.5, 0.0, -3.0]),
    "rewards": f64([[2.0, 1.0, 0.5], [0.0, 0.3, -1.0], [1.0, 2.0, 3.0]]),
}
KNOBS = {
    dpo_loss: {"label_smoothing": 0.2},
    kto_loss: {"reference_point": 0.4, "desirable_weight": 2.0},
    simpo_loss: {"gamma": 0.7},
}
ALL = [f for name, f in vars(losses).items() if name.endswith("_loss")]
each_loss = pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)


def batch_of(loss):
    names = [k for k, p in inspect.signature(loss).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {name: BATCH[name] for name in names}


def test_signatures():
    """The names and defaults that the trainers, the notebooks and the students' functions rely on."""
    four = "(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps"
    two, lengths = "(chosen_logps, rejected_logps", ", chosen_lengths, rejected_lengths"
    expected = {
        "sft_loss": "(logps, lengths)",
        "dpo_loss": four + ", *, beta=0.1, label_smoothing=0.0)",
        "ipo_loss": four + ", *, tau=0.1)",
        "kto_loss": four
        + ", *, beta=0.1, reference_point=0.0, desirable_weight=1.0, undesirable_weight=1.0)",
        "rdpo_loss": four + lengths + ", *, beta=0.1, alpha=0.05)",
        "cpo_loss": two + ", *, beta=0.1, nll_weight=1.0)",
        "slic_hf_loss": two + ", *, delta=1.0, nll_weight=1.0)",
        "rrhf_loss": two + lengths + ", *, nll_weight=1.0)",
        "orpo_loss": two + lengths + ", *, weight=0.1)",
        "simpo_loss": two + lengths + ", *, beta=2.0, gamma=1.0, length_normalize=True)",
        "preferred_ft_loss": "(chosen_logps)",
        "unlikelihood_loss": two + ", *, alpha=0.1)",
        "reward_pair_loss": "(chosen_rewards, rejected_rewards)",
        "reward_ranking_loss": "(rewards)",
        "ppo_policy_loss": "(logps, old_logps, advantages, *, clip=0.2)",
        "ppo_value_loss": "(values, old_values, returns, *, clip=0.2)",
    }
    assert {f.__name__: str(inspect.signature(f)) for f in ALL} == expected


@each_loss
def test_gradient_against_finite_differences(loss):
    arguments = batch_of(loss)
    inputs = [x.clone().requires_grad_(not name.endswith("lengths")) for name, x in arguments.items()]

    def call(*tensors):
        return loss(**dict(zip(arguments, tensors, strict=True)), **KNOBS.get(loss, {}))

    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@each_loss
def test_one_value_per_pair_in_the_same_dtype(loss):
    """Row i of the result depends on row i of the arguments alone: nothing is averaged inside."""
    arguments, knobs = batch_of(loss), KNOBS.get(loss, {})
    result = loss(**arguments, **knobs)
    assert result.shape == (3,) and result.dtype == torch.float64
    for i in range(3):
        alone = loss(**{name: x[i : i + 1] for name, x in arguments.items()}, **knobs)
        torch.testing.assert_close(alone, result[i : i + 1], rtol=1e-14, atol=0)
    assert loss(**{k: x.float() for k, x in arguments.items()}, **knobs).dtype == torch.float32


# not the PPO policy loss: its ratio is unbounded by definition
@pytest.mark.parametrize("loss", [f for f in ALL if f is not ppo_policy_loss], ids=lambda f: f.__name__)
def test_extreme_log_probs_stay_finite(loss):
    """Hundreds of nats either way, as after a collapse, in float32: no overflow in loss or gradient."""
    for sign in (1, -1):
        arguments = {
            name: (
                x if name.endswith("lengths") else 40 * x * (sign if name.startswith("chosen") else 1)
            ).float()
            for name, x in batch_of(loss).items()
        }
        if loss is orpo_loss:  # a mean log-prob is never positive
            arguments["chosen_logps"] = -arguments["chosen_logps"].abs()
        for name, x in arguments.items():
            x.requires_grad_(not name.endswith("lengths"))
        result = loss(**arguments)
        result.sum().backward()
        assert result.isfinite().all()
        assert all(x.grad.isfinite().all() for x in arguments.values() if x.grad is not None)


@each_loss
def test_integer_lengths_do(loss):
    arguments = batch_of(loss)
    integers = {k: x.long() if k.endswith("lengths") else x for k, x in arguments.items()}
    torch.testing.assert_close(loss(**integers), loss(**arguments), rtol=0, atol=0)


# --- with a reference model ---


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, kto_loss, rdpo_loss], ids=lambda f: f.__name__)
def test_only_log_ratios_matter(loss):
    """A constant added to policy and reference of one response changes nothing, unlike to policy alone."""
    arguments = batch_of(loss)
    before = loss(**arguments)
    for response in ("chosen", "rejected"):
        shifted = arguments | {k: arguments[k] + 3.7 for k in (f"{response}_logps", f"ref_{response}_logps")}
        torch.testing.assert_close(loss(**shifted), before, rtol=1e-12, atol=1e-12)
        half = arguments | {f"{response}_logps": arguments[f"{response}_logps"] + 3.7}
        assert (loss(**half) - before).abs().min() > 1e-3


def test_untrained_policy_costs_ln_2():
    logps = {k: BATCH[k] for k in PAIR} | {f"ref_{k}": BATCH[k] for k in PAIR}
    torch.testing.assert_close(dpo_loss(**logps), f64([LN2] * 3))
    torch.testing.assert_close(dpo_loss(**logps, label_smoothing=0.3), f64([LN2] * 3))
    torch.testing.assert_close(kto_loss(**logps), f64([1.0] * 3))
    torch.testing.assert_close(ipo_loss(**logps, tau=0.25), f64([4.0] * 3))
    # without a reference there is no such number: CPO and SimPO start from what the policy happens to prefer
    assert (cpo_loss(**{k: BATCH[k] for k in PAIR}, nll_weight=0.0) - LN2).abs().min() > 0.01
    assert (simpo_loss(**batch_of(simpo_loss), gamma=0.0) - LN2).abs().min() > 0.01


def test_dpo_gradient_identity():
    """DPO, the gradient below eq. 7: -beta sigmoid(-beta h) on the chosen, + on the rejected log-prob."""
    beta = 0.7
    x = {k: v.clone().requires_grad_() for k, v in batch_of(dpo_loss).items()}
    dpo_loss(**x, beta=beta).sum().backward()
    h = [1.6, -1.5 - 0.5, 0.5 + 2.0]  # (s_w - rho_w) - (s_l - rho_l) of the three pairs, by hand
    weight = f64([beta / (1 + math.exp(beta * v)) for v in h])
    torch.testing.assert_close(x["chosen_logps"].grad, -weight)
    torch.testing.assert_close(x["rejected_logps"].grad, weight)


def test_conservative_dpo_stops_at_its_confidence():
    """With label_smoothing eps the gradient is zero at sigmoid(beta h) = 1 - eps, and only there."""
    beta, eps = 0.5, 0.1
    stop = math.log((1 - eps) / eps) / beta  # sigmoid(beta h) = 1 - eps
    h = f64([stop - 1, stop, stop + 1]).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    dpo_loss(h, zero, zero, zero, beta=beta, label_smoothing=eps).sum().backward()
    below, at, above = h.grad.tolist()
    assert below < -1e-2 and abs(at) < 1e-15 and above > 1e-2


def test_dpo_swap_of_labels():
    """At label_smoothing 1/2 it does not matter which response is called chosen; at 0 it does."""
    a = batch_of(dpo_loss)
    swapped = (a["rejected_logps"], a["chosen_logps"], a["ref_rejected_logps"], a["ref_chosen_logps"])
    torch.testing.assert_close(dpo_loss(**a, label_smoothing=0.5), dpo_loss(*swapped, label_smoothing=0.5))
    assert (dpo_loss(**a) - dpo_loss(*swapped)).abs().min() > 0.01
    # -log sigmoid(-x) = -log sigmoid(x) + x
    torch.testing.assert_close(
        dpo_loss(*swapped, beta=0.3) - dpo_loss(**a, beta=0.3), 0.3 * f64([1.6, -2.0, 2.5])
    )


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_ipo_minimum(tau):
    target = 1 / (2 * tau)
    h = f64([target - 0.5, target, target + 0.5]).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    loss = ipo_loss(h, zero, zero, zero, tau=tau)
    torch.testing.assert_close(loss, f64([0.25, 0.0, 0.25]))
    loss.sum().backward()
    torch.testing.assert_close(h.grad, f64([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("tau, expected", [(0.1, 0.993307), (0.5, 0.731059), (1.0, 0.622459)])
def test_two_actions_ipo_stops_and_dpo_does_not(tau, expected):
    """IPO sec. 5.3: two actions, the first always preferred, uniform reference.

    IPO's optimum is pi(y_1) = sigmoid(1 / (2 tau)) < 1. DPO has none: its gradient still asks for more at any
    pi(y_1) < 1 and any beta, so the policy becomes deterministic.
    """
    logit = f64([0.0]).requires_grad_()
    reference = f64([math.log(0.5)])

    def first_and_second():
        return torch.log_softmax(torch.cat([logit, torch.zeros_like(logit)]), 0).split(1)

    for _ in range(60):
        (gradient,) = torch.autograd.grad(
            ipo_loss(*first_and_second(), reference, reference, tau=tau).sum(), logit
        )
        with torch.no_grad():
            logit -= 0.25 * gradient
    assert torch.sigmoid(logit).item() == pytest.approx(expected, abs=5e-7)
    for beta in (0.1, 1.0, 5.0):
        for value in (-5.0, 0.0, 5.0, 30.0):
            with torch.no_grad():
                logit.fill_(value)
            loss = dpo_loss(*first_and_second(), reference, reference, beta=beta).sum()
            assert torch.autograd.grad(loss, logit)[0].item() < 0


def test_kto_is_half_at_its_reference_point():
    z0 = 0.8
    reference = f64([-7.0])
    at_z0 = (reference + z0, reference + z0, reference, reference)
    for weights in ((1.0, 1.0), (2.0, 0.0), (0.0, 3.0)):
        loss = kto_loss(
            *at_z0, beta=0.3, reference_point=z0, desirable_weight=weights[0], undesirable_weight=weights[1]
        )
        assert loss.item() == pytest.approx(0.5 * sum(weights), rel=1e-14)


def test_kto_pushes_the_right_way():
    """The sign printed in SimPO Table 3 would reward raising pi(y_l)."""
    x = {k: v.clone().requires_grad_() for k, v in batch_of(kto_loss).items()}
    kto_loss(**x).sum().backward()
    assert (x["chosen_logps"].grad < 0).all() and (x["rejected_logps"].grad > 0).all()


def test_kto_reference_point():
    """A tensor does as well as a float, takes no gradient; only its distance to the log-ratios matters."""
    x = batch_of(kto_loss)
    z0 = f64(0.4).requires_grad_()
    policy = {k: v.clone().requires_grad_() for k, v in x.items()}
    loss = kto_loss(**policy, reference_point=z0)
    torch.testing.assert_close(loss.detach(), kto_loss(**x, reference_point=0.4), rtol=0, atol=1e-15)
    loss.sum().backward()
    assert z0.grad is None
    moved = x | {k: x[k] + 1.3 for k in PAIR}
    torch.testing.assert_close(kto_loss(**moved, reference_point=1.7), kto_loss(**x, reference_point=0.4))
    assert kto_loss(**{k: v.float() for k, v in x.items()}, reference_point=z0).dtype == torch.float32


def test_rdpo_is_dpo_with_a_length_penalty():
    x = batch_of(rdpo_loss)
    dpo = {k: x[k] for k in batch_of(dpo_loss)}
    torch.testing.assert_close(rdpo_loss(**x, alpha=0.0), dpo_loss(**dpo))
    longer = x | {k: x[k] + 5 for k in LENGTHS}
    torch.testing.assert_close(rdpo_loss(**longer), rdpo_loss(**x))  # only the difference counts
    # the reward is beta (s - rho) + alpha |y|: a longer y_w needs less from the policy
    h = f64([1.6, -2.0, 2.5])
    reward_gap = 0.1 * h + 0.02 * f64([4.0, -6.0, -16.0])
    torch.testing.assert_close(rdpo_loss(**x, alpha=0.02), torch.log1p(torch.exp(-reward_gap)))


# --- without a reference model ---


@pytest.mark.parametrize("loss", [cpo_loss, slic_hf_loss], ids=lambda f: f.__name__)
def test_contrast_and_likelihood(loss):
    """Raising both sums by c leaves the contrast and lowers the NLL, which is summed, by weight * c."""
    x = batch_of(loss)
    shifted = {k: v + 2.5 for k, v in x.items()}
    torch.testing.assert_close(loss(**shifted, nll_weight=0.0), loss(**x, nll_weight=0.0))
    torch.testing.assert_close(loss(**shifted, nll_weight=0.3), loss(**x, nll_weight=0.3) - 0.75)


def test_cpo_is_dpo_with_a_uniform_reference():
    x = batch_of(cpo_loss)
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(
        cpo_loss(**x, beta=0.3, nll_weight=0.0),
        dpo_loss(**x, ref_chosen_logps=zero, ref_rejected_logps=zero, beta=0.3),
    )


def test_slic_margin():
    """No gradient from the hinge once s_w leads by delta."""
    for lead, slope in ((0.9, -1.0), (1.1, 0.0)):
        s_w = f64([-5.0 + lead]).requires_grad_()
        slic_hf_loss(s_w, f64([-5.0]), delta=1.0, nll_weight=0.0).sum().backward()
        assert s_w.grad.item() == slope


@pytest.mark.parametrize(
    "loss, knobs",
    [
        (sft_loss, {}),
        (simpo_loss, {}),
        (orpo_loss, {}),
        (rrhf_loss, {"nll_weight": 0.0}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_length_normalized_losses_see_means_only(loss, knobs):
    """A response said twice, sum and length doubled, costs the same; only the sum doubled, it does not."""
    x = batch_of(loss)
    torch.testing.assert_close(loss(**{k: 2 * v for k, v in x.items()}, **knobs), loss(**x, **knobs))
    sums = {k: v if k.endswith("lengths") else 2 * v for k, v in x.items()}
    assert (loss(**sums, **knobs) - loss(**x, **knobs)).abs().max() > 0.01


def test_simpo_without_length_normalization_ignores_lengths():
    x = batch_of(simpo_loss)
    other = x | {"chosen_lengths": f64([1.0, 2.0, 3.0])}
    torch.testing.assert_close(
        simpo_loss(**x, length_normalize=False), simpo_loss(**other, length_normalize=False)
    )
    assert (simpo_loss(**x) - simpo_loss(**other)).abs().min() > 0.01


@pytest.mark.parametrize("beta, gamma_beta_ratio", [(2.0, 0.5), (2.5, 0.55), (10.0, 0.3)])
def test_simpo_in_the_units_of_the_authors_code(beta, gamma_beta_ratio):
    """gamma = beta * gamma_beta_ratio; their line is -logsigmoid(beta * (a_w - a_l - gamma_beta_ratio))."""
    x = batch_of(simpo_loss)
    a = [(w / n, r / m) for w, r, n, m in zip(*(v.tolist() for v in x.values()), strict=True)]
    authors = f64([softplus(-beta * (a_w - a_l - gamma_beta_ratio)) for a_w, a_l in a])
    torch.testing.assert_close(simpo_loss(**x, beta=beta, gamma=beta * gamma_beta_ratio), authors)


def test_orpo_weight_zero_is_sft():
    x = batch_of(orpo_loss)
    torch.testing.assert_close(orpo_loss(**x, weight=0.0), sft_loss(x["chosen_logps"], x["chosen_lengths"]))


def test_orpo_near_certainty():
    """p = 1 - 1e-12 and p = 1 exactly, where 1 - p cancels: finite loss and gradient, and the right odds."""
    ones = f64([1.0])
    loss = orpo_loss(f64([-1e-12]), f64([-0.7]), ones, ones, weight=1.0)
    # odds_w = 1e12, odds_l = 1 / (e^.7 - 1): the loss is log(1 + odds_l / odds_w) plus an NLL of 1e-12
    assert loss.item() == pytest.approx(1e-12 / (math.exp(0.7) - 1) + 1e-12, rel=1e-3, abs=0)
    for dtype in (torch.float32, torch.float64):
        for certain in (0.0, -1e-9, -1e-30):
            s_w = torch.tensor([certain, -1.0, certain], dtype=dtype, requires_grad=True)
            s_l = torch.tensor([-1.0, certain, certain], dtype=dtype, requires_grad=True)
            loss = orpo_loss(s_w, s_l, torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype))
            loss.sum().backward()
            assert loss.isfinite().all() and s_w.grad.isfinite().all() and s_l.grad.isfinite().all()


@pytest.mark.parametrize("x", [-1e-300, -1e-12, -1e-5, -0.3, -0.6931, -0.6932, -2.0, -40.0, -700.0])
def test_log1mexp(x):
    with localcontext() as context:
        context.prec = 400
        exact = float((1 - Decimal(x).exp()).ln())
    assert log1mexp(f64(x)).item() == pytest.approx(exact, rel=1e-14, abs=0)
    # the derivative is -1 / (e^-x - 1)
    t = f64(x).requires_grad_()
    log1mexp(t).backward()
    assert t.grad.item() == pytest.approx(-1 / math.expm1(-x), rel=1e-12, abs=0)


def test_unlikelihood_is_unbounded_below():
    chosen = f64([-6.0])
    assert unlikelihood_loss(chosen, f64([-1e4]), alpha=0.05).item() == 6 - 500
    torch.testing.assert_close(unlikelihood_loss(chosen, f64([-3.0]), alpha=0.0), preferred_ft_loss(chosen))


# --- reward model ---


def test_only_reward_differences_matter():
    chosen, rejected, rewards = BATCH["chosen_rewards"], BATCH["rejected_rewards"], BATCH["rewards"]
    torch.testing.assert_close(reward_pair_loss(chosen + 9, rejected + 9), reward_pair_loss(chosen, rejected))
    torch.testing.assert_close(
        reward_ranking_loss(rewards + f64([[9.0], [-3.0], [0.5]])), reward_ranking_loss(rewards)
    )
    assert reward_pair_loss(f64([0.3]), f64([0.3])).item() == pytest.approx(LN2)


def test_ranking_is_the_mean_over_all_pairs():
    """Every better-worse pair counts once and equally; for K = 2 it is the pair loss."""
    rewards = BATCH["rewards"]
    pairs = [reward_pair_loss(rewards[:, i], rewards[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(reward_ranking_loss(rewards), torch.stack(pairs).mean(0))
    torch.testing.assert_close(reward_ranking_loss(rewards[:, :2]), pairs[0])
    best_last = reward_ranking_loss(rewards.flip(1))
    assert (best_last - reward_ranking_loss(rewards)).abs().min() > 0.1


# --- PPO ---


def test_ppo_clipped_tokens_have_no_gradient():
    """A token beyond the clip in the direction of its advantage stops; one that went astray still learns."""
    ratio = f64([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
    advantages = f64([1.0, -1.0, 1.0, -1.0, 1.0, -3.0])
    old = f64([-2.0] * 6)
    logps = (old + ratio.log()).requires_grad_()
    ppo_policy_loss(logps, old, advantages).sum().backward()
    # d/dlogp of -A ratio is -A ratio
    torch.testing.assert_close(logps.grad, f64([0.0, 1.5, -0.5, 0.0, -1.1, 3.0]))
    assert logps.grad[0] == 0 and logps.grad[3] == 0


def test_ppo_losses_take_any_shape_and_ignore_a_common_shift():
    logps, old, advantages = torch.randn(
        3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    loss = ppo_policy_loss(logps, old, advantages)
    assert loss.shape == (2, 5)
    torch.testing.assert_close(ppo_policy_loss(logps + 4, old + 4, advantages), loss)
    torch.testing.assert_close(ppo_policy_loss(logps, old, 2 * advantages), 2 * loss)
    value_loss = ppo_value_loss(logps, old, advantages)
    assert value_loss.shape == (2, 5)
    torch.testing.assert_close(ppo_value_loss(logps + 4, old + 4, advantages + 4), value_loss)


def test_ppo_clipped_values_have_no_gradient():
    values = f64([1.5, 1.5, 1.1]).requires_grad_()
    ppo_value_loss(values, f64([1.0, 1.0, 1.0]), f64([3.0, 0.0, 3.0])).sum().backward()
    torch.testing.assert_close(values.grad, f64([0.0, 1.5, -1.9]))


# --- mistakes of the caller ---

THREE, TWO = f64([-1.0, -2.0, -3.0]), f64([-1.0, -2.0])
MISTAKES = [
    (lambda: dpo_loss(THREE, TWO, THREE, THREE), ("dpo_loss", "rejected_logps", "(2,)", "(3,)")),
    (lambda: dpo_loss(THREE, THREE, THREE, THREE[:1]), ("ref_rejected_logps", "(1,)")),
    (lambda: simpo_loss(THREE, THREE, -THREE, -TWO), ("simpo_loss", "rejected_lengths")),
    (lambda: cpo_loss(THREE[None], THREE[None]), ("cpo_loss", "chosen_logps", "(1, 3)", "(batch,)")),
    (lambda: ipo_loss(*[THREE.sum()] * 4), ("ipo_loss", "()", "(batch,)")),
    (lambda: preferred_ft_loss(THREE[:0]), ("preferred_ft_loss", "(0,)")),
    (lambda: sft_loss(THREE, f64([1.0, 0.0, 2.0])), ("sft_loss", "lengths", "0", "EOS")),
    (lambda: orpo_loss(THREE, THREE, -THREE, THREE), ("orpo_loss", "rejected_lengths", "-3")),
    (lambda: rdpo_loss(*[THREE] * 4, torch.zeros(3, dtype=torch.long), -THREE), ("chosen_lengths",)),
    (lambda: sft_loss(THREE, f64([1.0, math.nan, 2.0])), ("sft_loss", "lengths")),
    (lambda: slic_hf_loss([-1.0], [-2.0]), ("slic_hf_loss", "chosen_logps", "list")),
    (lambda: slic_hf_loss(torch.tensor([1]), torch.tensor([2])), ("slic_hf_loss", "int64")),
    (lambda: reward_ranking_loss(THREE), ("reward_ranking_loss", "(3,)", "best")),
    (lambda: reward_ranking_loss(THREE[:, None]), ("reward_ranking_loss", "(3, 1)")),
    (lambda: reward_pair_loss(THREE, TWO), ("reward_pair_loss", "rejected_rewards")),
    (lambda: ppo_policy_loss(THREE, THREE, TWO), ("ppo_policy_loss", "advantages")),
    (lambda: ppo_value_loss(THREE, TWO, THREE), ("ppo_value_loss", "old_values")),
    (lambda: ppo_policy_loss(THREE, THREE, THREE, clip=0.0), ("ppo_policy_loss", "clip")),
    (lambda: dpo_loss(*[THREE] * 4, beta=0.0), ("dpo_loss", "beta", "positive")),
    (lambda: dpo_loss(*[THREE] * 4, beta=math.nan), ("dpo_loss", "beta")),
    (lambda: dpo_loss(*[THREE] * 4, label_smoothing=0.6), ("dpo_loss", "label_smoothing", "0.5")),
    (lambda: dpo_loss(*[THREE] * 4, label_smoothing=-0.1), ("dpo_loss", "label_smoothing")),
    (lambda: ipo_loss(*[THREE] * 4, tau=-1.0), ("ipo_loss", "tau")),
    (lambda: kto_loss(*[THREE] * 4, reference_point=THREE), ("kto_loss", "reference_point", "one number")),
    (lambda: kto_loss(*[THREE] * 4, undesirable_weight=-1.0), ("kto_loss", "undesirable_weight")),
    (lambda: rrhf_loss(THREE, THREE, -THREE, -THREE, nll_weight=-1.0), ("rrhf_loss", "nll_weight")),
    (lambda: unlikelihood_loss(THREE, THREE, alpha=-0.1), ("unlikelihood_loss", "alpha")),
    (lambda: dpo_loss(THREE, THREE, THREE.to("meta"), THREE), ("dpo_loss", "ref_chosen_logps", "meta")),
]


@pytest.mark.parametrize("call, words", MISTAKES, ids=[f"{i}-{w[0]}" for i, (_, w) in enumerate(MISTAKES)])
def test_mistakes_get_one_sentence(call, words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "; " in message and len(message) < 200
