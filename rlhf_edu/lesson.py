"""What every notebook starts with: threads, scale, and the shipped checkpoints."""

import dataclasses
import functools
import html
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from . import data, models, rewards, scales, tokens, training
from .errors import UserError


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Models and texts, loaded when first asked for: the shipped ones, or those of a run at the size of the papers."""

    scale: str
    run: Path | None = None  # the folder of `reproduce` at a hub scale

    def sized(self, mini, smoke=None, hub=None):
        """`mini`; if given, `smoke` where the notebook only has to be seen to run, `hub` at the size of the papers."""
        other = hub if self.run is not None else smoke if self.scale == "smoke" else None
        return mini if other is None else other

    def at_scale(self) -> "Lesson":
        """This lesson with GPT-2 and real reviews where RLHF_EDU_SCALE is `gpt2` or `paper`, unchanged otherwise.

        Policy, reward model, prompts and comparisons are those that `python -m rlhf_edu reproduce` with that scale
        made: in its usual folder, or in RLHF_EDU_RUN.
        """
        name = os.environ.get("RLHF_EDU_SCALE") or "mini"
        if scales.SCALES[name].sft is not None:
            return self
        run = Path(os.environ.get("RLHF_EDU_RUN") or in_repository(f"outputs/{name}-seed0"))
        wanted = ("sft", "reward_model", "completions.jsonl", "heldout_completions.jsonl")
        if missing := [part for part in wanted if not (run / part).exists()]:
            raise UserError(
                f"RLHF_EDU_SCALE is {name}, but {run} has no {missing[0]}: first run "
                f"`python -m rlhf_edu reproduce --scale {name}` in the course's folder, or name its folder in RLHF_EDU_RUN"
            )
        return Lesson(name, run)

    @property
    def settings(self) -> scales.Scale:
        return scales.SCALES[self.scale]

    def place(self, part: str) -> str | Path:
        """Where "tokenizer", "base", "sft", "oracle" or "reward" lies: a folder, or a name of the hub."""
        if self.run is None:
            return data.MINI / part
        hub = {
            "tokenizer": self.settings.policy,
            "base": self.settings.policy,
            "oracle": self.settings.oracle,
        }
        return hub.get(part) or self.run / {"sft": "sft", "reward": "reward_model"}[part]

    @functools.cached_property
    def tokenizer(self):
        return tokens.load_tokenizer(self.place("tokenizer"))

    @functools.cached_property
    def base(self):
        """The base policy, frozen: rambles and cannot stop. Train a `models.copy_of` it."""
        return models.freeze(models.load_policy(self.place("base")))

    @functools.cached_property
    def sft(self):
        """The SFT policy, frozen: the reference of everything that follows."""
        return models.freeze(models.load_policy(self.place("sft")))

    @functools.cached_property
    def oracle(self):
        return models.freeze(models.load_classifier(self.place("oracle")))

    @functools.cached_property
    def reward_model(self):
        return models.freeze(models.load_classifier(self.place("reward")))

    @functools.cached_property
    def true_score(self) -> rewards.Score:
        """(prompts, responses) as token ids -> probability that the text is positive, (n,)."""
        if self.run is None:
            return rewards.oracle_score(self.oracle, self.tokenizer)
        return rewards.text_oracle_score(
            self.oracle, tokens.load_tokenizer(self.place("oracle")), self.tokenizer
        )

    def completions(self) -> list[dict]:
        """Four SFT responses to each of many prompts, with their true rewards: see `data.shipped_completions`."""
        return (
            data.shipped_completions()
            if self.run is None
            else data.read_completions(self.run / "completions.jsonl")
        )

    def prompts(self, split: str, count: int | None = None) -> list[list[int]]:
        """Token ids of prompts that no policy was trained on ("heldout") or of the others ("train")."""
        if self.run is None:
            texts = data.shipped_prompts(split)
        else:
            name = {"train": "completions.jsonl", "heldout": "heldout_completions.jsonl"}[split]
            texts = [row["prompt"] for row in data.read_completions(self.run / name)]
        return tokens.encode(self.tokenizer, texts[:count])


def start(seed: int = 0) -> Lesson:
    """Set threads and seed, read RLHF_EDU_SCALE, and give the lesson at scale `mini` or `smoke`."""
    scale = os.environ.get("RLHF_EDU_SCALE") or "mini"
    if scale not in scales.SCALES:
        raise UserError(
            f"RLHF_EDU_SCALE is {scale!r}: use one of {', '.join(scales.SCALES)}, or leave it unset"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()  # e.g. advice about attention masks, which right padding does not need
    training.set_threads(int(os.environ.get("OMP_NUM_THREADS") or 0) or None)
    torch.manual_seed(seed)
    return Lesson("smoke" if scale == "smoke" else "mini")


class Table:
    """Texts side by side, as a table of the notebook; plain text where there is no HTML."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = list(rows)

    def _repr_html_(self) -> str:
        cell = "style='text-align:left;vertical-align:top;white-space:pre-wrap'"
        head = "".join(f"<th {cell}>{html.escape(str(k))}</th>" for k in (self.rows or [{}])[0])
        body = "".join(
            "<tr>" + "".join(f"<td {cell}>{html.escape(_text(v))}</td>" for v in row.values()) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        return "\n".join(" | ".join(f"{k}: {_text(v)}" for k, v in row.items()) for row in self.rows)


def _text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def in_repository(path: str | Path) -> Path:
    """A path of this course, wherever the notebook runs."""
    return data.DATA.parent / path
