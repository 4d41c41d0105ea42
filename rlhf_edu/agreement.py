"""How far labelers agree: percent, Cohen's kappa, Fleiss' kappa, each with a 95 % interval.

Every labeler is a sequence with one label an item, the same items in the same order; a label is anything that
can be compared ("A", 0, True), None where the labeler gave none. Items that lack a label are left out and
counted. A tie is the label "tie"; what becomes of it is always said: `ties="count"` takes it for an answer like
the others (a tie agrees with a tie only), `ties="drop"` leaves out the items that anybody called a tie, as
InstructGPT does for the reward model's data.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np

from .errors import UserError
from .training import rng

TIE = "tie"
RESAMPLES = 2000
Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A measure of agreement and its 95 % interval; NaN where it is undefined."""

    name: str
    value: float
    low: float
    high: float
    items: int  # that the value rests on
    left_out: int  # for a missing label or a dropped tie
    method: str  # of the interval

    def __str__(self) -> str:
        number = (lambda x: f"{100 * x:.1f} %") if self.name == "agreement" else (lambda x: f"{x:.2f}")
        out = f", {self.left_out} left out" if self.left_out else ""
        if math.isnan(self.value):
            return f"undefined: everybody always gave the same label ({self.items} items{out})"
        if math.isnan(self.low):
            return f"{number(self.value)} ({self.items} items{out}; no interval)"
        interval = f"[{number(self.low)}, {number(self.high)}]"
        return f"{number(self.value)} {interval} ({self.items} items{out}; {self.method})"

    def __repr__(self) -> str:
        return f"{self.name} {self}"


def percent_agreement(*raters: Sequence[Hashable], ties: str = "count", seed: int = 0) -> Agreement:
    """Share of items on which two raters agree; with more raters the mean over all pairs of raters.

    Interval: Wilson's for two raters; for more a bootstrap over items, since the pairs of raters share labels.
    """
    codes, left_out = _codes(raters, ties)
    each = _pairs_that_agree(codes)
    if len(raters) == 2:
        low, high = wilson(int(each.sum()), len(each))
        return Agreement("agreement", float(each.mean()), low, high, len(each), left_out, "Wilson")
    low, high = _quantiles(_weights(len(each), seed) @ each / len(each))
    return Agreement("agreement", float(each.mean()), low, high, len(each), left_out, "bootstrap over items")


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], *, ties="count", seed=0) -> Agreement:
    """(observed - expected) / (1 - expected) agreement of two raters (Cohen 1960).

    Expected: that of two raters who draw at random, each with the frequencies of their own labels. Where that is
    1, everybody always gave the same label and kappa is undefined (NaN). Interval: bootstrap over items.
    """
    codes, left_out = _codes((first, second), ties)
    labels = int(codes.max()) + 1
    cells = np.eye(labels * labels)[codes[0] * labels + codes[1]]  # (items, labels * labels)

    def kappa(weights):  # (resamples, items), each row sums to the number of items
        table = (weights @ cells / codes.shape[1]).reshape(-1, labels, labels)
        observed = table.diagonal(axis1=1, axis2=2).sum(1)
        expected = (table.sum(2) * table.sum(1)).sum(1)
        return _corrected(observed, expected)

    return _with_bootstrap("Cohen's kappa", kappa, codes.shape[1], left_out, seed)


def fleiss_kappa(*raters: Sequence[Hashable], ties: str = "count", seed: int = 0) -> Agreement:
    """The same for two or more raters (Fleiss 1971); chance draws from the labels of all raters together.

    With two raters it is Scott's pi, a little different from Cohen's kappa. Interval: bootstrap over items.
    """
    codes, left_out = _codes(raters, ties)
    each = _pairs_that_agree(codes)
    counts = np.eye(int(codes.max()) + 1)[codes].sum(0)  # (items, labels)

    def kappa(weights):
        shares = weights @ counts / counts.sum()
        return _corrected(weights @ each / len(each), (shares**2).sum(1))

    return _with_bootstrap("Fleiss' kappa", kappa, len(each), left_out, seed)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; it stays inside [0, 1] and is sound for few trials."""
    if not 1 <= trials < math.inf or not 0 <= successes <= trials:
        raise UserError(f"{successes} of {trials} is no share: give 0 <= successes <= trials, trials >= 1")
    share, z2 = successes / trials, Z * Z / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials)) / (1 + z2)
    low = 0.0 if successes == 0 else centre - half  # exact ends; the formula leaves a rounding error
    return low, 1.0 if successes == trials else centre + half


def _codes(raters, ties: str) -> tuple[np.ndarray, int]:
    """(raters, items) label numbers of the items that everybody labelled, and how many were left out."""
    if ties not in ("count", "drop"):
        raise UserError(
            f"ties={ties!r} is unknown: use 'count' (a tie is a label) or 'drop' (leave ties out)"
        )
    if len(raters) < 2:
        raise UserError(f"agreement needs two labelers or more, and this is {len(raters)}: add another one")
    try:
        lists = [list(r) for r in raters]
        hash(tuple(map(tuple, lists)))
    except TypeError as error:
        raise UserError(
            f"labels cannot be compared ({error}): give each labeler a list of words or numbers, one an item"
        ) from error
    if len({len(r) for r in lists}) > 1:
        sizes = ", ".join(str(len(r)) for r in lists)
        raise UserError(
            f"the labelers labelled {sizes} items: give each one label an item, None for no label"
        )
    items = list(zip(*lists, strict=True))
    kept = [i for i in items if not any(map(_missing, i)) and not (ties == "drop" and TIE in i)]
    if not kept:
        raise UserError(
            f"no item has a label of all {len(lists)} labelers ({len(items)} items looked at): label some first"
        )
    number: dict[Hashable, int] = {}
    codes = np.array([[number.setdefault(label, len(number)) for label in item] for item in kept]).T
    return codes, len(items) - len(kept)


def _missing(label) -> bool:
    return label is None or isinstance(label, float) and math.isnan(label)


def _pairs_that_agree(codes: np.ndarray) -> np.ndarray:
    """(items,) share of the pairs of raters that gave the same label."""
    return np.mean([a == b for a, b in itertools.combinations(codes, 2)], axis=0)


def _corrected(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    undefined = np.isclose(expected, 1.0, rtol=0, atol=1e-12)
    return np.where(undefined, np.nan, (observed - expected) / np.where(undefined, 1.0, 1.0 - expected))


def _weights(items: int, seed: int) -> np.ndarray:
    """How often each bootstrap resample takes each item, (resamples, items)."""
    return rng(seed, 31).multinomial(items, np.full(items, 1 / items), size=RESAMPLES).astype(float)


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    return tuple(float(q) for q in np.quantile(values, [0.025, 0.975]))


def _with_bootstrap(name: str, kappa, items: int, left_out: int, seed: int) -> Agreement:
    """Resamples in which kappa is undefined are dropped; if they are more than 5 %, no interval is given."""
    value = float(kappa(np.ones((1, items)))[0])
    resampled = kappa(_weights(items, seed))
    defined = resampled[~np.isnan(resampled)]
    low, high = _quantiles(defined) if len(defined) >= 0.95 * RESAMPLES else (math.nan, math.nan)
    return Agreement(name, value, low, high, items, left_out, "bootstrap over items")
