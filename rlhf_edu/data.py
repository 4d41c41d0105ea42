"""Prompts, demonstrations and comparisons as `datasets.Dataset`, in the formats TRL takes.

- prompts: {"prompt"}; demonstrations: {"prompt", "completion"}; comparisons: {"prompt", "chosen", "rejected"} and
  what is known about them (true rewards, lengths). Prompt and response simply follow each other as text.
- From the package's own files (`shipped_prompts`, ...), from IMDb in a folder or on the hub (`imdb.py`).
"""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from .errors import FREE_SPACE, UserError, explained
from .rewards import Labeler
from .training import replacing, rng

DATA = Path(__file__).resolve().parent.parent / "data"
MINI = DATA / "models" / "mini"


def read_jsonl(path: str | Path, columns: Sequence[str]) -> list[dict]:
    """Rows of a JSON-lines file, each holding at least `columns`."""
    path = Path(path)
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            rows = []
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError
                if missing := [c for c in columns if c not in row]:
                    raise UserError(f"{path}, line {number}: {missing[0]!r} is missing; restore the file")
                rows.append(row)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): restore it, e.g. with `git checkout data`"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number} is not JSON: restore the file, e.g. with `git checkout data`"
        ) from error
    if not rows:
        raise UserError(f"{path} is empty: restore it, e.g. with `git checkout data`")
    return rows


def write_jsonl(path: str | Path, rows: Sequence[dict]) -> None:
    with (
        explained(f"writing {path}", FREE_SPACE),
        replacing(Path(path)) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def shipped_prompts(split: str) -> list[str]:
    """Prompts of 2-8 tokens that the base policy wrote; split "train" or "heldout" (no prompt is in both)."""
    return [r["prompt"] for r in read_jsonl(DATA / f"prompts_{split}.jsonl", ["prompt"])]


def shipped_demonstrations() -> datasets.Dataset:
    """Review openings that stop, sampled from the shipped SFT policy."""
    return datasets.Dataset.from_list(read_jsonl(DATA / "demonstrations.jsonl", ["prompt", "completion"]))


def shipped_completions() -> list[dict]:
    """Four SFT samples for each of some prompts, with the oracle's reward of each."""
    return read_completions(DATA / "completions.jsonl")


def read_completions(path: str | Path) -> list[dict]:
    """Rows {"prompt", "responses", "rewards", "lengths"}, the lists one entry a response (length in tokens)."""
    rows = read_jsonl(path, ["prompt", "responses", "rewards", "lengths"])
    for number, row in enumerate(rows, 1):
        texts, rewards, lengths = (
            row[k] if isinstance(row[k], list) else [] for k in ("responses", "rewards", "lengths")
        )
        right = len(texts) == len(rewards) == len(lengths) > 0 and isinstance(row["prompt"], str)
        right = (
            right
            and all(isinstance(t, str) for t in texts)
            and all(isinstance(n, int) and n >= 0 for n in lengths)
        )
        if not right or not all(isinstance(r, int | float) and math.isfinite(r) for r in rewards):
            raise UserError(
                f"{path}, row {number}: responses, rewards and lengths must be lists of as many texts, finite numbers and "
                "whole numbers; restore the file"
            )
    return rows


def completion_rows(prompts: Sequence[str], texts, rewards, lengths) -> list[dict]:
    """Rows as `read_completions` gives them, from flat lists that hold the K responses of each prompt in turn."""
    count = len(texts) // max(1, len(prompts))
    if not len(texts) == len(rewards) == len(lengths) == count * len(prompts) or not count:
        raise UserError(
            f"{len(prompts)} prompts, {len(texts)} responses, {len(rewards)} rewards and {len(lengths)} lengths: give "
            "equally many responses for each prompt, one reward and one length for each response"
        )
    rows = []
    for number, prompt in enumerate(prompts):
        part = slice(number * count, (number + 1) * count)
        rewards_here = [round(float(r), 5) for r in rewards[part]]
        rows.append(
            {"prompt": prompt, "responses": texts[part], "rewards": rewards_here, "lengths": lengths[part]}
        )
    return rows


def all_pairs(completions: Sequence[dict], labeler: Labeler | None = None) -> datasets.Dataset:
    """All K-choose-2 pairs of each prompt's K completions, labelled by `labeler` (default: no noise).

    The pairs of a prompt stand together, so that a batch computes each completion once (InstructGPT 3.5).
    Identical responses make no pair.
    """
    labeler = labeler or Labeler()
    rows = []
    for c in completions:
        for i, j in itertools.combinations(range(len(c["responses"])), 2):
            if c["responses"][i] != c["responses"][j]:
                rows.append((c, i, j))
    if not rows:
        raise UserError("no pair can be made: every prompt needs at least two different responses")
    part = {
        key: (
            np.array([c[key][i] for c, i, _ in rows], dtype=float),
            np.array([c[key][j] for c, _, j in rows], dtype=float),
        )
        for key in ("rewards", "lengths")
    }
    first = labeler.prefers_first(*part["rewards"], *part["lengths"])
    pairs = []
    for (c, i, j), keep in zip(rows, first, strict=True):
        chosen, rejected = (i, j) if keep else (j, i)
        pairs.append(
            {
                "prompt": c["prompt"],
                "chosen": c["responses"][chosen],
                "rejected": c["responses"][rejected],
                "chosen_reward": float(c["rewards"][chosen]),
                "rejected_reward": float(c["rewards"][rejected]),
                "chosen_length": int(c["lengths"][chosen]),
                "rejected_length": int(c["lengths"][rejected]),
            }
        )
    return datasets.Dataset.from_list(pairs)


def check_comparisons(comparisons) -> None:
    missing = {"prompt", "chosen", "rejected"} - set(comparisons.column_names)
    if missing:
        raise UserError(
            f"comparisons lack the column {min(missing)!r}: they need prompt, chosen and rejected"
        )
    if not len(comparisons):
        raise UserError("there are no comparisons to train on: the data set is empty")


def split_prompts(prompts: Sequence[str], heldout: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """(train, held out): distinct prompts, shuffled, none in both."""
    distinct = sorted(set(prompts))
    order = rng(seed, 11).permutation(len(distinct))
    return [distinct[i] for i in order[heldout:]], [distinct[i] for i in order[:heldout]]
