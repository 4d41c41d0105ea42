"""What is right in notebook 07, computed in other ways than on its pages, and the five broken losses of its bug hunt."""

import math

import torch
import torch.nn.functional as F

# --- 07.1: signs, token by token ---

TOY_PAIRS = {  # (tokens, log-prob of each token), winner first; the reference gives every token -0.7
    "short": ((4, -0.9), (10, -0.5)),
    "long": ((10, -0.4), (4, -0.6)),
}
TOY_REFERENCE = -0.7


def signs_by_tokens() -> dict[str, str]:
    found = {}
    for pair, sides in TOY_PAIRS.items():
        sums, ratios = [], []
        for count, logp in sides:
            sums.append(math.fsum(logp for _ in range(count)))
            ratios.append(math.fsum(logp - TOY_REFERENCE for _ in range(count)))
        means = [total / count for total, (count, _) in zip(sums, sides, strict=True)]
        for reward, (winner, loser) in (("sum", sums), ("mean", means), ("dpo", ratios)):
            found[f"{reward}_{pair}"] = "+" if winner > loser else "-"
    return found


# --- 07.2: the margin of sums in two parts ---


def lengths_and_sums(rng, pairs=7):
    return {
        "chosen_logps": torch.tensor(rng.normal(-30, 9, pairs)),
        "rejected_logps": torch.tensor(rng.normal(-30, 9, pairs)),
        "chosen_lengths": torch.tensor(rng.integers(2, 40, pairs)),
        "rejected_lengths": torch.tensor(rng.integers(2, 40, pairs)),
    }


def parts_by_steps(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
    """Walk from loser to winner, once by way of (winner's mean, loser's length), once the other way; average."""
    per_token, by_length = [], []
    columns = (chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    for w, l, n_w, n_l in zip(*(c.tolist() for c in columns), strict=True):
        a, b = w / n_w, l / n_l
        value = lambda mean, length: mean * length
        per_token.append((value(a, n_l) - value(b, n_l) + value(a, n_w) - value(b, n_w)) / 2)
        by_length.append((value(a, n_w) - value(a, n_l) + value(b, n_w) - value(b, n_l)) / 2)
    return torch.tensor(per_token, dtype=torch.float64), torch.tensor(by_length, dtype=torch.float64)


# --- 07.3: the loss ---


def pairs_with_lengths(rng, pairs=6):
    draw = lambda: torch.tensor(rng.normal(-20, 4, pairs)).requires_grad_()
    lengths = lambda: torch.tensor(rng.integers(3, 40, pairs))
    return {
        "chosen_logps": draw(),
        "rejected_logps": draw(),
        "chosen_lengths": lengths(),
        "rejected_lengths": lengths(),
        "beta": float(rng.uniform(1.2, 4)),
        "gamma": float(rng.uniform(0.3, 2)),
    }


def simpo_by_probabilities(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    """SimPO eq. 6 as a choice between two rewards, the winner's less gamma; each mean is a sum of equal shares."""
    winner = beta * torch.stack([s / int(n) for s, n in zip(chosen_logps, chosen_lengths, strict=True)])
    loser = beta * torch.stack([s / int(n) for s, n in zip(rejected_logps, rejected_lengths, strict=True)])
    return -torch.stack([winner - gamma, loser]).log_softmax(0)[0]


# --- 07.4: the push on one token ---


def push_inputs(rng):
    return {
        k: v.detach() if torch.is_tensor(v) else v for k, v in pairs_with_lengths(rng).items()
    }  # the answer is a gradient already


def push_by_differences(
    chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma, step=1e-5
):
    """Nudge the log-prob of one token: the sum moves by as much."""

    def loss(w, l, n_w, n_l):
        return math.log1p(math.exp(gamma - beta * (w / n_w - l / n_l)))

    columns = [x.tolist() for x in (chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)]
    out = [], []
    for w, l, n_w, n_l in zip(*columns, strict=True):
        out[0].append((loss(w + step, l, n_w, n_l) - loss(w - step, l, n_w, n_l)) / (2 * step))
        out[1].append((loss(w, l + step, n_w, n_l) - loss(w, l - step, n_w, n_l)) / (2 * step))
    return tuple(torch.tensor(x, dtype=torch.float64) for x in out)


# --- 07.7: five broken losses ---

# The page's pair: policy -6 over 12 tokens and -5.6 over 8, reference -7.2 and -5.2; beta 2, gamma 1.
PAGE_PAIR = ((-6.0, 12, -7.2), (-5.6, 8, -5.2))


def page_batch() -> dict:
    """The page's pair token by token: log-probs and reference (1, time) of each side, with masks."""
    given = {}
    for side, (total, count, reference) in zip(("chosen", "rejected"), PAGE_PAIR, strict=True):
        given[side] = torch.full((1, count), total / count, dtype=torch.float64)
        given["ref_" + side] = torch.full((1, count), reference / count, dtype=torch.float64)
    return given


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (n, time) with 0 behind each row, mask)."""
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(r) for r in rows])
    return values, torch.arange(values.shape[1]) < lengths[:, None]


def mystery_loss(number: int | None):
    """Loss 1 to 5 of the page, or the right one: (chosen, rejected, ref_chosen, ref_rejected, beta, gamma) -> (n,).

    The first four are lists of n tensors of token log-probs.
    """

    def loss(chosen, rejected, ref_chosen, ref_rejected, beta=2.0, gamma=1.0):
        width = max(map(len, [*chosen, *rejected]))
        scores = []
        for side, reference in ((chosen, ref_chosen), (rejected, ref_rejected)):
            values, mask = padded(side)
            values, lengths = values.sum(1), mask.sum(1)
            if number == 4:
                values = values - padded(reference)[0].sum(1)
            if number != 1:
                values = values / (width if number == 3 else lengths)
            scores.append(values)
        difference = scores[0] - scores[1]
        if number == 2:
            return -F.logsigmoid(beta * (difference - gamma))
        if number == 5:
            return -F.logsigmoid(beta * difference) + gamma
        return -F.logsigmoid(beta * difference - gamma)

    return loss


def fingerprints() -> list[dict]:
    """What five tests say of the right loss and of losses 1 to 5."""
    pair = page_batch()
    sides = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    alone = [[pair[s][0]] for s in sides]
    with_long = [[pair[s][0], torch.full((40,), -0.3, dtype=torch.float64)] for s in sides]
    twice = [[torch.cat([pair[s][0]] * 2)] for s in sides]
    moved = [*alone[:2], [alone[2][0] - 0.1], alone[3]]
    rows = []
    for number in (None, 1, 2, 3, 4, 5):
        loss = mystery_loss(number)
        value = loss(*alone)[0].item()
        slopes = []
        for gamma in (0.0, 1.0):
            token = alone[0][0].clone().requires_grad_()
            slopes.append(
                torch.autograd.grad(loss([token], *alone[1:], gamma=gamma).sum(), token)[0][0].item()
            )
        rows.append(
            {
                "loss": "right" if number is None else str(number),
                "our pair": value,
                "beside a longer pair": loss(*with_long)[0].item(),
                "every token twice": loss(*twice)[0].item(),
                "another reference": loss(*moved)[0].item(),
                "gradient at γ = 0": slopes[0],
                "at γ = 1": slopes[1],
            }
        )
    return rows


def broken_by_hand() -> dict[int, str]:
    """Which bug each number has: the loss of our pair under each bug, by hand, against what is shown."""
    (w, n_w, ref_w), (l, n_l, ref_l) = PAGE_PAIR
    softplus = lambda x: math.log1p(math.exp(x))
    by_hand = {
        "A": softplus(1 - 2 * (w - l) / max(n_w, n_l)),
        "B": softplus(-2 * (w / n_w - l / n_l)) + 1,
        "C": softplus(1 - 2 * (w - l)),
        "D": softplus(1 - 2 * ((w - ref_w) / n_w - (l - ref_l) / n_l)),
        "E": softplus(2 * (1 - (w / n_w - l / n_l))),
    }
    found = {}
    for row in fingerprints()[1:]:
        found[int(row["loss"])] = next(
            bug for bug, value in by_hand.items() if abs(value - row["our pair"]) < 1e-9
        )
    return found
