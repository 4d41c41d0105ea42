"""The broken frontier scripts of notebook 06, on a world of few sequences, and the shipped results read by hand."""

import csv
import itertools
import math

from ..data import DATA

BROKEN = {1: "D", 2: "B", 3: "A", 4: "C"}  # number on the page's table: letter of the fragment
WORDS = ("good", "plain", "bad", "end")
LONGEST = 4
POLICIES = (  # probabilities of the four words at every step: SFT, after 100 updates, after 200
    (0.20, 0.40, 0.25, 0.15),
    (0.33, 0.38, 0.16, 0.13),
    (0.50, 0.30, 0.08, 0.12),
)


def responses():
    """All responses, as tuples of indices into WORDS: they stop at "end" or after LONGEST words."""
    for length in range(1, LONGEST + 1):
        for words in itertools.product(range(3), repeat=length - 1):
            yield (*words, 3)
            if length == LONGEST:
                yield from ((*words, last) for last in range(3))


def logp(response, policy) -> float:
    return math.fsum(math.log(policy[word]) for word in response)


def oracle(response) -> float:
    return 1 / (1 + math.exp(-1.2 * (response.count(0) - response.count(2))))


def learned(response) -> float:
    """A reward model that likes a long response as well."""
    return 1 / (1 + math.exp(-1.2 * (response.count(0) - response.count(2)) - 0.5 * len(response)))


def reported_by(number: int | None) -> dict:
    """What script 1 to 4 of the page, or the right one, reports after 100 and 200 updates; exact expectations."""
    bug, row = BROKEN.get(number), {}
    for step, policy in zip((100, 200), POLICIES[1:], strict=True):
        reference = POLICIES[1] if bug == "D" and step == 200 else POLICIES[0]
        chances = {r: math.exp(logp(r, policy)) for r in responses()}
        if bug == "B":
            chances = {(policy.index(max(policy[:3])),) * LONGEST: 1.0}
        score = learned if bug == "C" else oracle
        row[f"reward, {step}"] = math.fsum(p * score(r) for r, p in chances.items())
        row[f"KL, {step}"] = math.fsum(
            p * (logp(r, policy) - logp(r, reference)) / (len(r) if bug == "A" else 1)
            for r, p in chances.items()
        )
    return row


def found_by_symptoms() -> dict:
    """Name each row of the page's table by what is odd about it."""
    found, right = {}, reported_by(None)
    for number in BROKEN:
        row = reported_by(number)
        off = {name for name in row if not math.isclose(row[name], right[name], rel_tol=1e-9)}
        if off == {"KL, 200"}:
            found[number] = "D"
        elif off == {"KL, 100", "KL, 200"}:
            found[number] = "A"
        elif off == {"reward, 100", "reward, 200"}:
            found[number] = "C"
        else:
            found[number] = "B"
    return found


def best_within(nats: float) -> str:
    """The letter of exercise 06.4 whose best reward at a KL of `nats` or less is highest, mean over shipped seeds."""
    best: dict = {}
    for name, method_of in (("frontier", lambda row: row["method"]), ("best_of_n", lambda row: "Best-of-N")):
        with open(DATA / "results" / "mini" / f"{name}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if float(row["kl"]) <= nats:
                    seeds = best.setdefault(method_of(row), {})
                    seeds[row["seed"]] = max(float(row["reward"]), seeds.get(row["seed"], 0.0))
    letters = {"DPO": "A", "PPO": "B", "PPO-GT": "C", "Best-of-N": "D", "Preferred-FT": "E"}
    means = {letters[m]: sum(s.values()) / len(s) for m, s in best.items() if m in letters}
    return max(means, key=means.get)
