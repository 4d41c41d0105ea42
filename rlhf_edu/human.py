"""People's comparisons and summaries, from a local folder or the hub, in the course's columns.

Dialogue: Anthropic/hh-rlhf. Summaries: CarperAI/openai_summarize_tldr and .../openai_summarize_comparisons (from Stiennon
et al. 2020), the samples published with InstructGPT. Judgments by three people each: PandaLM's test set. None of these
texts ships with the course. source: a folder that holds the files under the names they were published with, at any
depth, or, for the dialogues, "hub"; unset: the environment variable RLHF_EDU_HUMAN.
"""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from . import hub as pinned
from .agreement import TIE, wilson
from .errors import UserError, explained

HUMAN, ASSISTANT, TLDR = "\n\nHuman:", "\n\nAssistant:", "TL;DR:"
NUMBERS = ("annotator1", "annotator2", "annotator3")
FETCH = "fetch the file again"


def load_hh(
    source=None, *, subset="helpful-base", split="test", single_turn: bool = False
) -> datasets.Dataset:
    """Comparisons {"prompt", "chosen", "rejected"} of Anthropic's dialogues; the prompt ends in "Assistant:".

    subset: "helpful-base", "helpful-online", "helpful-rejection-sampled" or "harmless-base". single_turn: only dialogues
    with one message of the human, on which the DPO paper evaluates (section 6.2). Left out: pairs with equal
    responses, and those whose two dialogues differ before the last answer.
    """
    rows = _rows(
        source,
        [f"**/{subset}.{split}.jsonl*", f"**/{subset}/{split}.jsonl*"],
        ["chosen", "rejected"],
        ("Anthropic/hh-rlhf", {"data_dir": subset, "split": split}),
    )
    pairs = []
    for row in rows:
        prompt = row["chosen"][: row["chosen"].rfind(ASSISTANT) + len(ASSISTANT)]
        chosen, rejected = row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]
        clean = ASSISTANT in prompt and row["rejected"].startswith(prompt) and ASSISTANT not in rejected
        if clean and chosen.strip() != rejected.strip() and (not single_turn or prompt.count(HUMAN) == 1):
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _dataset(pairs, f"hh-rlhf {subset} {split}")


def load_tldr(source=None, *, split="test") -> datasets.Dataset:
    """Demonstrations {"prompt", "completion"}: posts that end in "TL;DR:", and their authors' own summaries."""
    rows = _rows(
        source,
        [f"**/openai_summarize_tldr/**/{split}*", f"**/*tldr_{split}*"],
        ["prompt", "label"],
        None,
    )
    kept = [
        {"prompt": _post(r["prompt"]), "completion": _summary(r["label"])} for r in rows if r["label"].strip()
    ]
    return _dataset(kept, f"openai_summarize_tldr {split}")


def load_summary_comparisons(source=None, *, split="test", shortest: int = 5) -> datasets.Dataset:
    """Comparisons of two summaries of a post, in the form of `load_tldr`.

    Left out: equal summaries, and those of fewer than `shortest` words, which are hardly summaries.
    """
    rows = _rows(
        source,
        [f"**/openai_summarize_comparisons/**/{split}*", f"**/*summarize_comparisons_{split}*"],
        ["prompt", "chosen", "rejected"],
        None,
    )
    pairs = []
    for row in rows:
        chosen, rejected = _summary(row["chosen"]), _summary(row["rejected"])
        if chosen != rejected and min(len(chosen.split()), len(rejected.split())) >= shortest:
            pairs.append({"prompt": _post(row["prompt"]), "chosen": chosen, "rejected": rejected})
    return _dataset(pairs, f"openai_summarize_comparisons {split}")


def load_summary_samples(source=None) -> pd.DataFrame:
    """model, prompt, reference, summary: InstructGPT's published TL;DR samples, 12 models on 100 posts."""
    columns = ["model_type", "context", "ref_text", "sample"]
    rows = _rows(source, ["**/tldr_samples.csv*", "**/*tldr*samples*.csv*"], columns, None)
    return pd.DataFrame(
        {
            "model": [r["model_type"] for r in rows],
            "prompt": [_post(r["context"]) for r in rows],
            "reference": [_summary(r["ref_text"]) for r in rows],
            "summary": [_summary(r["sample"]) for r in rows],
        }
    )


def load_pandalm(source=None) -> tuple[pd.DataFrame, list[list[str]]]:
    """(prompt, first, second) of PandaLM's test set and its three annotators' labels, each "A", "B" or "tie".

    Six of the published responses stand there as JSON's true, without quotes: they are read as the text "true".
    """
    names = [f"annotator{n}" for n in (1, 2, 3)]
    columns = ["instruction", "input", "response1", "response2", *names]
    patterns = ["**/pandalm/testset*.json*", "**/testset-v1.json*"]
    rows = _rows(source, patterns, columns, None, unquoted=("response1", "response2"))
    table = pd.DataFrame(
        {
            "prompt": [f"{r['instruction']}\n\n{r['input']}".strip() for r in rows],
            "first": [r["response1"] for r in rows],
            "second": [r["response2"] for r in rows],
        }
    )
    label = {0: TIE, 1: "A", 2: "B", "0": TIE, "1": "A", "2": "B"}
    if wrong := [r[name] for r in rows for name in names if not _one_of(label, r[name])]:
        raise UserError(f"an annotator of PandaLM says {wrong[0]!r}: it must be 0, 1 or 2; {FETCH}")
    return table, [[label[r[name]] for r in rows] for name in names]


def longer_is_chosen(comparisons) -> dict:
    """{"share", "low", "high", "pairs"}: how often people chose the longer response (characters; equal ones left out),
    with Wilson's interval: the accuracy of a judge who looks at length alone."""
    difference = np.array([len(c) - len(r) for c, r in zip(comparisons["chosen"], comparisons["rejected"])])
    difference = difference[difference != 0]
    low, high = wilson(int((difference > 0).sum()), len(difference))
    return {"share": float((difference > 0).mean()), "low": low, "high": high, "pairs": len(difference)}


def _one_of(known: dict, value) -> bool:
    return isinstance(value, int | str) and value in known


def _post(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith(TLDR) else f"{text}\n\n{TLDR}"


def _summary(text: str) -> str:
    """A summary that follows its prompt: a space, then the text, on one line."""
    return " " + " ".join(str(text).strip().removeprefix(TLDR).split())


def _rows(source, patterns: Sequence[str], columns: Sequence[str], hub, unquoted=()) -> list[dict]:
    """unquoted: the columns whose texts may stand there as a JSON truth value or number."""
    source = source or os.environ.get("RLHF_EDU_HUMAN")
    or_hub = ", or say source='hub'" if hub else ""
    if not source:
        raise UserError(f"no data given: name a folder (RLHF_EDU_HUMAN=FOLDER){or_hub}")
    if str(source) == "hub":
        if hub is None:
            raise UserError(
                f"this file is not fetched from the hub: put {patterns[0].rpartition('/')[2]} into a folder"
            )
        name, options = hub
        with explained(
            f"loading {name} from the hub", "connect to the network once, or name a folder with it"
        ):
            return list(datasets.load_dataset(name, revision=pinned.revision(name), **options))
    files = sorted({f for p in patterns for f in Path(source).glob(p) if f.is_file()})
    if not files:
        told = " or ".join(p.removeprefix("**/") for p in patterns)
        raise UserError(f"{source} holds no {told}: check the folder{or_hub}")
    rows, advice = [], f"{FETCH}{or_hub}"
    for file in files:
        with explained(f"reading {file}", advice):
            rows += _read(file)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{files[0].name}, row {number + 1}: it has no columns; {advice}")
        if missing := [c for c in columns if row.get(c) is None]:
            raise UserError(f"{files[0].name}, row {number + 1}: {missing[0]!r} is missing; {advice}")
        row |= {c: json.dumps(row[c]) for c in unquoted if isinstance(row[c], bool | int | float)}
        if wrong := [c for c in columns if not isinstance(row[c], str) and c not in NUMBERS]:
            raise UserError(f"{files[0].name}, row {number + 1}: {wrong[0]!r} is no text; {advice}")
    return rows


def _read(path: Path) -> list[dict]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return pd.read_parquet(path).to_dict("records")
    if name.endswith(".csv"):
        return pd.read_csv(path, keep_default_na=False, dtype=str).to_dict("records")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        if name.endswith(".json"):
            return json.load(file)
        return [json.loads(line) for line in file if line.strip()]


def _dataset(rows: list[dict], what: str) -> datasets.Dataset:
    if not rows:
        raise UserError(f"nothing of {what} is left after the filters: check the files")
    return datasets.Dataset.from_list(rows)
