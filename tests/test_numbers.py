"""What is no number goes no further: one sentence from each function that would have passed a NaN on in silence."""

import numpy as np
import pytest

from rlhf_edu import arena, evaluate, judges, labelling, rewards, tldr, win_rates
from rlhf_edu.errors import UserError, numbers

NAN = float("nan")
PAIR = labelling.Pair("a", " b", " c", (NAN, 0.0), (1, 1))
CASES = {
    "scores of a judge": lambda: judges.score_judge(lambda p, r: [NAN])(["a"], ["b"], ["c"]),
    "scores of a simulated judge": lambda: judges.simulated_judge(lambda p, r: [NAN])(["a"], ["b"], ["c"]),
    "preferences of a fit": lambda: win_rates.fit_logistic([1.0, NAN], np.ones((2, 1))),
    "features of a fit": lambda: win_rates.fit_logistic([1.0, 0.0], [[1.0], [NAN]]),
    "ridge": lambda: win_rates.fit_logistic([1.0, 0.0], np.ones((2, 1)), ridge=NAN),
    "rows of a fit": lambda: win_rates.fit_logistic([1.0], np.ones((2, 1))),
    "difficulty's ridge": lambda: win_rates.prompt_difficulty([[1.0, 0.0]], ridge=NAN),
    "preferences of battles": lambda: arena.battles(["a"], [["A", 1.0]], "b"),
    "preferences of battles, NaN": lambda: arena.battles(["a"], [[NAN, 1.0]], "b"),
    "lengths": lambda: win_rates.length_features([1.0, NAN], [1.0, 2.0]),
    "ragged lengths": lambda: win_rates.length_features([[1.0], [2.0, 3.0]], [1.0, 2.0]),
    "noise of grades": lambda: arena.simulated_grades([0.5], noise=NAN),
    "no judgments": lambda: arena.simulated_grades([0.5], judgments=0),
    "no runs": lambda: arena.power(10, 60.0, runs=0),
    "choose_by": lambda: evaluate.best_of_n(np.ones((1, 2)), [1], choose_by=[[NAN, 1.0]]),
    "choose_by of another shape": lambda: evaluate.best_of_n(np.ones((1, 2)), [1], choose_by=[[1.0]]),
    "rewards of pairs": lambda: labelling.simulated_labels([PAIR], rewards.Labeler()),
    "no pairs": lambda: labelling.draw_pairs([], -1),
    "a checkpoint by path": lambda: tldr.load("../sft"),
    "posts and summaries": lambda: tldr.scores(tldr.posts(2), ["one"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name):
    with pytest.raises(UserError) as raised:
        CASES[name]()
    assert "\n" not in str(raised.value) and len(str(raised.value)) > 20


def test_the_first_bad_entry_is_named():
    with pytest.raises(UserError, match=r"rewards, entry 1, 0, must be finite, but it is nan"):
        numbers("rewards", [[1, 2], [NAN, 3]])
    assert numbers("rewards", [[1, 2]]).tolist() == [[1.0, 2.0]]
