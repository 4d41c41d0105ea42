"""Withheld exercises: variations of the public ones, whose numbers, hyper-parameters and order of choices are drawn
from an instructor's secret.

This file is public, and so is the way to each answer; what is withheld is which numbers a term gets, and its solved
notebook. Who wants exercises that nobody has seen writes a file of the same form: a function `variants(rng)` that
returns a list of `Variant`, and gives it to `python -m rlhf_edu student --variants FILE`.
"""

import dataclasses
import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .checks import Exercise, Mistake
from .errors import UserError

AFTER = '"Graded after you hand in: the numbers of this exercise are your instructor\'s."'


@dataclasses.dataclass(frozen=True)
class Variant:
    """An exercise with its cells: `statement` in markdown, `solution` with nbgrader's marks, `answer` its name."""

    exercise: Exercise
    statement: str
    solution: str
    answer: str
    points: float = 2.0


def load(seed: str, file: str | None = None) -> list[Variant]:
    """The variants that this secret draws, from this file or an instructor's own."""
    if file is None:
        return variants(random.Random(f"rlhf_edu {seed}"))
    try:
        spec = importlib.util.spec_from_file_location("rlhf_edu_own_variants", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.variants(random.Random(f"rlhf_edu {seed}"))
    except Exception as error:  # an instructor's own file may do anything
        raise UserError(
            f"{file} made no variants ({type(error).__name__}: {error}); see rlhf_edu/variants.py"
        ) from error


def notebook(seed: str, file: Path | None = None):
    """The withheld notebook, with solutions."""
    from nbformat import v4

    def graded(cell, name, **about):
        number = name.replace(".", "-")
        about = {
            "schema_version": 3,
            "locked": False,
            "task": False,
            "solution": False,
            "grade": False,
        } | about
        about["grade_id"] = ("check-" if about["grade"] else "") + f"{number}-withheld"
        cell.metadata["nbgrader"], cell.id = about, about["grade_id"]
        return cell

    text = "# Withheld exercises\n\nThey vary exercises of notebooks 02 to 10. Work them out with paper, or with code."
    setup = "import math\n\nimport torch\n\nfrom rlhf_edu.checks import check"
    cells = [v4.new_markdown_cell(text, id="title"), v4.new_code_cell(setup, id="set-up")]
    for variant in load(seed, file):
        name = variant.exercise.name
        cells += [
            v4.new_markdown_cell(f"### Exercise {name} · {variant.exercise.title}\n\n{variant.statement}",
                                 id=f"statement-{name.replace('.', '-')}"),
            graded(v4.new_code_cell(variant.solution), name, solution=True),
            graded(v4.new_code_cell(f'check("{name}", {variant.answer})'), name, grade=True, locked=True,
                   points=variant.points),
        ]  # fmt: skip
    book = v4.new_notebook(cells=cells)
    book.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return book


def hide_checks(student) -> None:
    """The student edition cannot ask a check that only the instructor has; `grade` puts the check cells back."""
    for cell in student.cells:
        if cell.source.startswith("check("):
            cell.source = AFTER


# --- the exercises ---


def value(name: str, solution: str) -> str:
    return f"{name} = None\n### BEGIN SOLUTION\n{name} = {solution}\n### END SOLUTION"


def variants(rng: random.Random) -> list[Variant]:
    return [
        make(rng, f"90.{i}")
        for i, make in enumerate((dpo_by_hand, gae_by_hand, shares, powers, choice, judged, controlled), 1)
    ]


def dpo_by_hand(rng, name):
    """Varies 04.1: numbers instead of code, and the loss is not all that is asked."""
    beta = rng.choice((0.05, 0.2, 0.25, 0.3, 0.5))
    w, l, rw, rl = (-rng.randint(120, 480) / 10 for _ in range(4))

    def truth():
        margin = beta * (w - rw) - beta * (l - rl)
        return math.log1p(math.exp(-margin)), margin

    text = f"""A pair of responses has these summed log-probs, in nats:

| | policy | reference |
|---|---|---|
| chosen | {w} | {rw} |
| rejected | {l} | {rl} |

With beta = {beta}: what is DPO's loss on this pair, and what is its implicit reward margin, chosen minus rejected?
Give `answer_1 = (loss, margin)`, to four digits."""
    other = math.log1p(math.exp(beta * ((w - rw) - (l - rl)))), -beta * ((w - rw) - (l - rl))
    unscaled = math.log1p(math.exp(-((w - rw) - (l - rl)))), (w - rw) - (l - rl)
    mistakes = (
        Mistake("chosen and rejected are the wrong way round.", other),
        Mistake("beta is missing.", unscaled),
    )
    task = Exercise(name, "one pair by hand", truth, mistakes=mistakes, tolerance=1e-3)
    solution = f"(math.log1p(math.exp(-{beta} * (({w} - {rw}) - ({l} - {rl})))), {beta} * (({w} - {rw}) - ({l} - {rl})))"
    return Variant(task, text, value("answer_1", solution), "answer_1")


def gae_by_hand(rng, name):
    """Varies notebook 03's advantages: numbers instead of code."""
    rewards, values = ([rng.randint(-9, 9) / 10 for _ in range(4)] for _ in range(2))
    gamma, lam = rng.choice((1.0, 0.9)), rng.choice((0.5, 0.8, 0.95))

    def advantages(gamma=gamma, lam=lam):
        after = values[1:] + [0.0]
        deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
        return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(4)]

    text = f"""A response of four tokens ends with its last token. Its rewards are `{rewards}`, the values before each token
`{values}`, the value after the end is 0. Discount gamma = {gamma}, GAE lambda = {lam}. Give the four advantages as the
list `answer_2`, before any whitening, to four digits."""
    mistakes = (
        Mistake("this is lambda = 1: returns minus values.", advantages(lam=1.0)),
        Mistake("this is lambda = 0: the one-step errors alone.", advantages(lam=0.0)),
    )
    task = Exercise(name, "advantages by hand", advantages, mistakes=mistakes, tolerance=1e-3)
    solution = f"""answer_2 = None
### BEGIN SOLUTION
rewards, values, later = {rewards}, {values}, 0.0
answer_2 = []
for t in reversed(range(4)):
    delta = rewards[t] + {gamma} * (values[t + 1] if t < 3 else 0.0) - values[t]
    later = delta + {gamma} * {lam} * later
    answer_2.insert(0, later)
### END SOLUTION"""
    return Variant(task, text, solution, "answer_2")


def shares(rng, name):
    """Varies 04's optimal policy: three responses, another beta."""
    beta, rewards = rng.choice((0.5, 0.8, 1.5, 2.0)), [rng.randint(-20, 20) / 10 for _ in range(3)]
    reference = rng.choice(([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.1, 0.2]))

    def policy(beta=beta, reference=tuple(reference)):
        weights = np.array(reference) * np.exp(np.array(rewards) / beta)
        return (weights / weights.sum()).tolist()

    text = f"""A prompt has three responses with rewards `{rewards}`; the reference gives them probabilities `{reference}`. Which
policy has the largest mean reward minus beta times the KL from the reference, with beta = {beta}? Give its three
probabilities as the list `answer_3`, to four digits."""
    mistakes = (
        Mistake("the reference is missing.", policy(reference=(1, 1, 1))),
        Mistake("beta stands on the wrong side of the fraction.", policy(beta=1 / beta)),
    )
    task = Exercise(name, "the optimal policy of a small world", policy, mistakes=mistakes, tolerance=1e-3)
    solution = f"(torch.tensor({reference}).double().log() + torch.tensor({rewards}).double() / {beta}).softmax(0).tolist()"
    return Variant(task, text, value("answer_3", solution), "answer_3", 3.0)


def powers(rng, name):
    """Between DPO and SimPO: lengths to a power, and a margin; nobody's loss."""
    power, beta, gamma = (
        rng.choice((0.25, 0.5, 0.75)),
        rng.choice((0.5, 1.5, 3.0)),
        rng.choice((0.3, 0.7, 1.2)),
    )

    def inputs(draws):
        draw = lambda: torch.tensor(draws.normal(-20, 5, 6))
        return {"chosen_logps": draw().requires_grad_(), "rejected_logps": draw().requires_grad_(),
                "chosen_lengths": torch.tensor(draws.integers(3, 40, 6)),
                "rejected_lengths": torch.tensor(draws.integers(3, 40, 6))}  # fmt: skip

    def loss(power=power, beta=beta, gamma=gamma):
        def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
            w, l = chosen_logps / chosen_lengths**power, rejected_logps / rejected_lengths**power
            return F.softplus(gamma - beta * (w - l))

        return answer

    text = f"""SimPO divides a response's log-prob by its length. Write the loss that divides by the length **to the power
{power}** instead, with beta = {beta} and the absolute margin gamma = {gamma}: minus the log of the sigmoid of (beta
times the difference of the two scores, minus gamma). All four arguments are (pairs,); return one loss a pair."""
    mistakes = (
        Mistake("the margin has the wrong sign: it makes the task harder.", loss(gamma=-gamma)),
        Mistake("this divides by the length itself.", loss(power=1.0)),
        Mistake("the margin is not multiplied by beta here.", loss(gamma=gamma * beta)),
    )
    names = "chosen_logps, rejected_logps, chosen_lengths, rejected_lengths"
    solution = f'''def my_loss({names}):
    """Four tensors (pairs,) -> loss (pairs,)."""
    ### BEGIN SOLUTION
    chosen = chosen_logps / chosen_lengths**{power}
    rejected = rejected_logps / rejected_lengths**{power}
    return -torch.nn.functional.logsigmoid({beta} * (chosen - rejected) - {gamma})
    ### END SOLUTION'''
    task = Exercise(name, "a loss of your own", loss(), inputs, mistakes)
    return Variant(task, text, solution, "my_loss", 3.0)


def choice(rng, name):
    """A prediction whose choices come in another order each term."""
    options = [
        "the policy's log-prob of the chosen response rises",
        "the policy's log-ratio of chosen to rejected rises",  # the reference does not move
        "the policy's KL from the reference rises",
        "the policy's log-prob of the rejected response falls",
    ]
    right, letters = options[1], "ABCD"
    rng.shuffle(options)
    found = letters[options.index(right)]
    lines = "\n".join(f"- **{letter}**: {option}" for letter, option in zip(letters, options, strict=True))
    text = f"""DPO's loss of one pair is smaller after an update than before. Which of these **must** be true of this pair?

{lines}

Give `answer_5`, a letter."""
    hint = (
        "eq. 7 sees only one number of a pair. Which changes of the two log-probs leave that number as it is?"
    )
    mistakes = tuple(Mistake(hint, letter) for letter in letters if letter != found)
    task = Exercise(name, "what a falling loss says", lambda: found, mistakes=mistakes)
    return Variant(task, text, value("answer_5", repr(found)), "answer_5", 1.0)


def judged(rng, name):
    """Varies 10.1: a count by hand, with other answers and another worth of a tie."""
    answers, first = ["A", "A", "A", "B", "B", "B", "B", "tie", "tie", "tie"], [False] * 10
    first[0] = first[rng.choice((7, 8))] = True
    if rng.random() < 0.5:
        first[3] = True
    together = list(zip(answers, first, strict=True))
    rng.shuffle(together)
    answers, first = [a for a, _ in together], [f for _, f in together]
    tie = rng.choice((0.25, 0.4, 0.6))

    def rate(tie=tie, swapped=True):
        points = [
            tie if a == "tie" else float((a == "A") == (f or not swapped)) for a, f in zip(answers, first)
        ]
        return 100 * sum(points) / len(points)

    rows = "\n".join(f"| {a} | {'A' if f else 'B'} |" for a, f in zip(answers, first, strict=True))
    text = f"""A judge answered ten times; the policy's text was shown under the letter in the second column.

| answer | the policy was |
|---|---|
{rows}

What is the policy's win rate in percent, if a tie counts as **{tie}** of a win? Give the number `answer_6`."""
    mistakes = (
        Mistake("a tie has another worth here than one half.", rate(tie=0.5)),
        Mistake("the answers were not swapped back.", rate(swapped=False)),
    )
    task = Exercise(name, "ten answers by hand", rate, mistakes=mistakes, tolerance=1e-3)
    solution = f"""answer_6 = None
### BEGIN SOLUTION
answers, first = {answers}, {first}
points = [{tie} if a == "tie" else float((a == "A") == f) for a, f in zip(answers, first)]
answer_6 = 100 * sum(points) / len(points)
### END SOLUTION"""
    return Variant(task, text, solution, "answer_6")


def controlled(rng, name):
    """Varies 10.5: numbers instead of code, and another length to predict at."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))

    def rate(at, inside=False):
        logits = [length * at + difficulty * e + bias for e in ease]
        return 100 * (sigmoid(sum(logits) / 3) if inside else sum(map(sigmoid, logits)) / 3)

    right, wrong = 0.0, [0.0]
    while min(abs(right - w) for w in wrong) < 1:  # points: each mistake is to be seen in the answer
        length, difficulty, bias = -rng.randint(8, 20) / 10, rng.randint(5, 15) / 10, rng.randint(-8, 8) / 10
        ease = [rng.randint(low, low + 10) / 10 for low in (-22, -5, 12)]
        at = rng.choice((-0.5, -0.25, 0.25, 0.5))
        right, wrong = rate(at), (rate(0.0), rate(-at), rate(at, inside=True))
    text = f"""The regression of a length-controlled win rate has the weights length = {length}, difficulty = {difficulty},
bias = {bias}. Three prompts have the difficulties `{ease}`. What win rate, in percent, does it predict if the length
feature, tanh of the standardized (baseline - model), is **{at}** on each of them? Give the number `answer_7`, to four
digits."""
    mistakes = (
        Mistake("this is predicted at equal length; another length is asked for.", wrong[0]),
        Mistake("the feature has the wrong sign.", wrong[1]),
        Mistake("take the sigmoid of each prompt before the mean.", wrong[2]),
    )
    task = Exercise(name, "predicted at another length", lambda: right, mistakes=mistakes, tolerance=1e-4)
    solution = (
        f"100 * sum(1 / (1 + math.exp(-({length} * {at} + {difficulty} * e + {bias}))) for e in {ease}) / 3"
    )
    return Variant(task, text, value("answer_7", solution), "answer_7", 3.0)
