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
    """The shipped models and texts, loaded when first asked for; `sized` chooses a number by scale."""

    scale: str

    def sized(self, mini, smoke):
        """`mini`, or `smoke` where the notebook only has to be seen to run (RLHF_EDU_SCALE=smoke)."""
        return smoke if self.scale == "smoke" else mini

    @functools.cached_property
    def tokenizer(self):
        return tokens.load_tokenizer(data.MINI / "tokenizer")

    @functools.cached_property
    def base(self):
        """The base policy, frozen: rambles and cannot stop. Train a `models.copy_of` it."""
        return models.freeze(models.load_policy(data.MINI / "base"))

    @functools.cached_property
    def sft(self):
        """The SFT policy, frozen: the reference of everything that follows."""
        return models.freeze(models.load_policy(data.MINI / "sft"))

    @functools.cached_property
    def oracle(self):
        return models.freeze(models.load_classifier(data.MINI / "oracle"))

    @functools.cached_property
    def reward_model(self):
        return models.freeze(models.load_classifier(data.MINI / "reward"))

    @functools.cached_property
    def true_score(self) -> rewards.Score:
        """(prompts, responses) as token ids -> probability that the text is positive, (n,)."""
        return rewards.oracle_score(self.oracle, self.tokenizer)

    def prompts(self, split: str, count: int | None = None) -> list[list[int]]:
        """Token ids of shipped prompts; split "train" or "heldout"."""
        return tokens.encode(self.tokenizer, data.shipped_prompts(split)[:count])


def start(seed: int = 0) -> Lesson:
    """Set threads and seed, read RLHF_EDU_SCALE (`mini` or `smoke`), say what runs here."""
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
