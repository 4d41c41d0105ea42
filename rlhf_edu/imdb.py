"""IMDb reviews from a local folder or from the hub, and how openings, prompts and windows are cut from them."""

import gzip
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np

from . import hub
from .errors import UserError
from .tokens import prefix_lengths
from .training import rng

HUB_NAME = "stanfordnlp/imdb"
SPLITS = ("train", "unsupervised", "test")
_JSONL = {"train": "imdb_train.jsonl*", "unsupervised": "imdb_unsup.jsonl*", "test": "imdb_test*.jsonl*"}
_ACL = {
    "train": ("train", ("neg", "pos")),
    "unsupervised": ("train", ("unsup",)),
    "test": ("test", ("neg", "pos")),
}


def load_imdb(source: str | Path | None = None, splits=SPLITS) -> dict[str, list[dict]]:
    """`{split: [{"text", "label", "film"}]}`, label 1 positive, 0 negative, -1 unknown.

    source: a folder with the original `aclImdb` layout, or with `imdb_train.jsonl.gz` and its likes; "hub" for
    stanfordnlp/imdb; unset: the environment variable RLHF_EDU_IMDB.
    """
    source = source or os.environ.get("RLHF_EDU_IMDB")
    if not source:
        raise UserError(
            "no IMDb given: name a folder (--imdb FOLDER or RLHF_EDU_IMDB=FOLDER), or say --imdb hub"
        )
    if str(source) == "hub":
        return {split: _from_hub(split) for split in splits}
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"there is no IMDb folder {folder}: check --imdb or RLHF_EDU_IMDB")
    if (folder / "aclImdb").is_dir():
        folder = folder / "aclImdb"
    return {split: _from_folder(folder, split) for split in splits}


def _from_hub(split: str) -> list[dict]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB_NAME, split=split, revision=hub.revision(HUB_NAME))
    except Exception as error:  # many kinds: no network, a proxy, a missing cache
        raise UserError(
            f"{HUB_NAME} could not be loaded from the hub ({type(error).__name__}); connect to the network once, "
            "or point RLHF_EDU_IMDB at a folder with the reviews"
        ) from error
    return [{"text": clean(r["text"]), "label": r["label"], "film": ""} for r in rows]


def _from_folder(folder: Path, split: str) -> list[dict]:
    files = sorted(folder.glob(_JSONL[split]))
    if files:
        return _read_jsonl(files[0])
    parent, labels = _ACL[split]
    rows = []
    for label in labels:
        paths = sorted((folder / parent / label).glob("*.txt"))
        if not paths:
            raise UserError(
                f"{folder} holds no IMDb {split} reviews: it needs {_JSONL[split].rstrip('*')}(.gz) or "
                f"{parent}/{label}/*.txt as in the original archive"
            )
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            rows.append({"text": clean(text), "label": {"neg": 0, "pos": 1}.get(label, -1), "film": ""})
    return rows


def _read_jsonl(path: Path) -> list[dict]:
    rows: list[dict] = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                rows.append(
                    {"text": clean(row["text"]), "label": int(row["label"]), "film": row.get("film", "")}
                )
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged at line {len(rows) + 1} ({type(error).__name__}): fetch it again"
        ) from error
    if not rows:
        raise UserError(f"{path} is empty: fetch it again")
    return rows


def clean(text: str) -> str:
    """One line of plain text: HTML line breaks become spaces, runs of white space one space."""
    return re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text)).strip()


def prefixes(tokenizer, token_ids, seed: int = 0) -> list[list[int]]:
    """The first 2 to 8 tokens of each text, cut where a word ends; how many, is drawn for each (DPO App. C.1)."""
    result = []
    for index, ids in enumerate(token_ids):
        cuts = prefix_lengths(tokenizer, ids)
        if cuts:
            result.append(list(ids[: int(rng(seed, index).choice(cuts))]))
    return result


_NO_END = re.compile(r"(Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|[A-Z])\.$")  # titles and initials


def sentence_ends(tokenizer, ids) -> list[int]:
    """Lengths at which a prefix of `ids` ends a sentence: a full stop, ! or ? (and a quote), then a new word."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    ends, word = [], ""
    for n, piece in enumerate(pieces, 1):
        word = piece[1:] if piece.startswith("Ġ") else word + piece
        ended = re.search(r"[.!?][\"')]*$", piece) and not _NO_END.match(word)
        if ended and (n == len(pieces) or re.match(r"Ġ(?![a-z])", pieces[n])):
            ends.append(n)
    return ends


def opening(tokenizer, ids, generator: np.random.Generator, shortest: int = 12, longest: int = 55):
    """The first sentences of a review up to a random budget of tokens, so that lengths vary; None if none ends."""
    budget = int(generator.integers(shortest + 4, longest + 1))
    ends = [n for n in sentence_ends(tokenizer, ids[: longest + 2]) if shortest <= n <= longest]
    within = [n for n in ends if n <= budget]
    end = within[-1] if within else (ends[0] if ends else None)
    return None if end is None else list(ids[:end])


def broken_words(tokenizer, ids) -> float:
    """Share of tokens that continue a word: high where names and rare words are spelled out in pieces."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))[1:]
    return sum(bool(re.match(r"[A-Za-z0-9\u00c0-\u00ff]", p)) for p in pieces) / max(1, len(pieces))


def openings(
    tokenizer, token_ids, seed: int = 0, most_broken: float = 1.0
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids without EOS) of each review that has a usable opening: the SFT demonstrations.

    most_broken: leave out texts with a larger share of `broken_words`, which a tiny policy cannot spell.
    """
    result = []
    for index, ids in enumerate(token_ids):
        generator = rng(seed, index)
        text = opening(tokenizer, ids, generator)
        cuts = prefix_lengths(tokenizer, text) if text else []
        if cuts and broken_words(tokenizer, text) <= most_broken:
            cut = int(generator.choice(cuts))
            result.append((text[:cut], text[cut:]))
    return result
