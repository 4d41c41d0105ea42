"""Agreement: numbers worked by hand from the definitions, and what happens where they are undefined."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from rlhf_edu.agreement import cohen_kappa, fleiss_kappa, percent_agreement, wilson


def from_table(table):
    """Two label lists that have this contingency table (rows: first rater)."""
    cells = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    return [i for i, _ in cells], [j for _, j in cells]


# --- percent ---


def test_percent_agreement_and_wilson_by_hand():
    first, second = list("AAAAABBBBB"), list("AAAABBBBBA")  # 8 of 10
    found = percent_agreement(first, second)
    assert found.value == 0.8 and found.items == 10 and found.left_out == 0 and found.method == "Wilson"
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = 0.8, n = 10, z² = 3.8415
    assert (found.low, found.high) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert repr(found) == "agreement 80.0 % [49.0 %, 94.3 %] (10 items; Wilson)"


@pytest.mark.parametrize("successes, trials", [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (145, 200)])
def test_wilson_is_scipys(successes, trials):
    theirs = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_nothing(one_sentence):
    for bad in ((0, 0), (3, 2), (-1, 4)):
        with one_sentence("no share"):
            wilson(*bad)


def test_with_three_raters_the_mean_over_pairs_of_raters():
    raters = "AAB", "ABB", "AAA"
    pairs = [percent_agreement(a, b).value for a, b in itertools.combinations(raters, 2)]
    found = percent_agreement(*raters)
    assert found.value == pytest.approx(np.mean(pairs)) == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert found.low <= found.value <= found.high and "bootstrap" in found.method


# --- kappa ---


def test_cohens_kappa_by_hand():
    found = cohen_kappa(*from_table([[20, 5], [10, 15]]))  # observed 35/50, expected .5*.6 + .5*.4 = .5
    assert found.value == pytest.approx((0.7 - 0.5) / (1 - 0.5)) and found.items == 50
    assert found.low < 0.4 < found.high


def test_cohens_kappa_with_three_labels_by_hand():
    table = [[10, 2, 0], [1, 5, 1], [0, 0, 1]]  # observed 16/20; expected (12*11 + 7*7 + 1*2)/400 = 183/400
    assert cohen_kappa(*from_table(table)).value == pytest.approx((16 / 20 - 183 / 400) / (1 - 183 / 400))


def test_kappa_is_one_zero_and_minus_one():
    assert cohen_kappa("ABAB", "ABAB").value == 1.0
    assert cohen_kappa(*from_table([[4, 4], [4, 4]])).value == pytest.approx(0)
    assert cohen_kappa("ABAB", "BABA").value == pytest.approx(-1)


def test_fleiss_kappa_by_hand():
    # 4 items, 3 raters. Per item the share of agreeing pairs: 1, 1/3, 1/3, 1 -> mean 2/3.
    # Labels in all: 3+2+1+0 = 6 of 12 A -> chance .5. kappa = (2/3 - 1/2) / (1 - 1/2) = 1/3
    raters = ["AAAB", "AABB", "ABBB"]
    assert [sum(r[i] == "A" for r in raters) for i in range(4)] == [3, 2, 1, 0]
    assert fleiss_kappa(*raters).value == pytest.approx(1 / 3)


def test_fleiss_kappa_of_the_textbook_table():
    """Ten subjects, fourteen raters, five labels: the table most descriptions of Fleiss' kappa use; 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    items = [[label for label, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss_kappa(*zip(*items, strict=True)).value == pytest.approx(0.210, abs=5e-4)
    # and by the definition, with exact fractions
    shares = np.sum(table, axis=0) / 140
    each = [(sum(n * n for n in row) - 14) / (14 * 13) for row in table]
    exact = (np.mean(each) - (shares**2).sum()) / (1 - (shares**2).sum())
    assert fleiss_kappa(*zip(*items, strict=True)).value == pytest.approx(exact, abs=1e-12)


def test_with_two_raters_fleiss_is_scotts_pi_not_cohens_kappa():
    first, second = from_table([[20, 5], [10, 15]])  # pooled: 55 of 100 label 0, chance .55² + .45² = .505
    assert fleiss_kappa(first, second).value == pytest.approx((0.7 - 0.505) / (1 - 0.505))


def test_a_rater_order_or_other_names_change_nothing():
    first, second = from_table([[10, 2, 0], [1, 5, 1], [0, 0, 1]])
    kappa = cohen_kappa(first, second)
    assert cohen_kappa(second, first).value == pytest.approx(kappa.value)
    assert cohen_kappa(["xyz"[i] for i in first], ["xyz"[i] for i in second]) == kappa
    assert cohen_kappa(np.array(first), np.array(second)) == kappa


# --- ties, missing labels, edges ---


def test_ties_count_as_a_label_or_are_left_out():
    first = ["A", "A", "tie", "tie", "B", "A"]
    second = ["A", "B", "tie", "B", "B", "tie"]
    counted, dropped = (percent_agreement(first, second, ties=t) for t in ("count", "drop"))
    assert (counted.value, counted.items, counted.left_out) == (3 / 6, 6, 0)
    assert (dropped.value, dropped.items, dropped.left_out) == (2 / 3, 3, 3)
    assert (
        cohen_kappa(first, second, ties="drop").items == fleiss_kappa(first, second, ties="drop").items == 3
    )


def test_missing_labels_are_left_out_and_counted():
    first, second = ["A", None, "B", "A", float("nan")], ["A", "A", "A", None, "B"]
    for measure in (percent_agreement, cohen_kappa, fleiss_kappa):
        found = measure(first, second)
        assert found.items == 2 and found.left_out == 3 and "3 left out" in repr(found)


def test_when_everybody_says_the_same_kappa_is_undefined():
    for measure in (cohen_kappa, fleiss_kappa):
        found = measure("AAAA", "AAAA")
        assert math.isnan(found.value) and math.isnan(found.low)
        assert "undefined" in repr(found) and "same label" in repr(found)
    found = percent_agreement("AAAA", "AAAA")
    assert found.value == found.high == 1.0 and 0.5 < found.low < 0.52  # Wilson: 4 of 4 proves little
    assert cohen_kappa("AAAA", "AAAB").value == 0.0  # 75 % agreement, and chance alone gives 75 %


def test_one_item_has_no_interval_of_kappa():
    found = cohen_kappa("A", "B")
    assert found.value == 0 and found.low <= 0 <= found.high
    few = cohen_kappa("AB", "AB")  # half of the resamples hold one label only
    assert few.value == 1 and math.isnan(few.low) and "no interval" in repr(few)


def test_what_cannot_be_measured_is_one_sentence(one_sentence):
    for measure in (percent_agreement, fleiss_kappa):
        with one_sentence("two labelers or more", "1"):
            measure("AAB")
    for measure in (percent_agreement, fleiss_kappa, cohen_kappa):
        with one_sentence("3, 2 items"):
            measure("AAB", "AA")
        with one_sentence("no item has a label"):
            measure([None, "A"], ["A", None])
        with one_sentence("no item has a label"):
            measure([], [])
        with one_sentence("no item has a label"):
            measure(["tie", "A"], ["A", "tie"], ties="drop")
        with one_sentence("ties='half'"):
            measure("AB", "AB", ties="half")


# --- intervals ---


def test_the_same_seed_gives_the_same_interval():
    first, second = from_table([[20, 5], [10, 15]])
    one, again, other = (cohen_kappa(first, second, seed=s) for s in (0, 0, 1))
    assert one == again and one.value == other.value and (one.low, one.high) != (other.low, other.high)


@pytest.mark.parametrize("measure", [cohen_kappa, fleiss_kappa, percent_agreement])
def test_intervals_cover_the_truth_about_as_often_as_they_say(measure):
    """Two labelers that are each right with probability 0.85 about a fair coin; truth from a very large sample."""
    draw = np.random.default_rng(5)

    def two(n):
        coin = draw.random(n) < 0.5
        return [list(coin ^ (draw.random(n) < 0.15)) for _ in range(2)]

    truth = measure(*two(20_000)).value if measure is percent_agreement else 2 * (0.85**2 + 0.15**2) - 1
    covered = sum((found := measure(*two(60))).low <= truth <= found.high for _ in range(100))
    assert covered >= 85
