"""Loading people's comparisons: small files of the published schemas; the real ones where RLHF_EDU_HUMAN names them."""

import gzip
import json
import os

import pandas as pd
import pytest

from rlhf_edu import data
from rlhf_edu.agreement import fleiss_kappa, percent_agreement
from rlhf_edu.errors import UserError
from rlhf_edu.human import (
    load_hh,
    load_pandalm,
    load_summary_comparisons,
    load_summary_samples,
    load_tldr,
    longer_is_chosen,
)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


ASK = "\n\nHuman: Where?\n\nAssistant:"
LONG = f"{ASK} In town.\n\nHuman: Which?\n\nAssistant:"
HH = [
    {"chosen": f"{ASK} There, I think.", "rejected": f"{ASK} No."},
    {"chosen": f"{LONG} Ours.", "rejected": f"{LONG} Yours, the old one."},
    {"chosen": f"{ASK} Same.", "rejected": f"{ASK} Same."},
    {"chosen": f"{LONG} A.", "rejected": f"{ASK} Other town.\n\nHuman: Which?\n\nAssistant: B."},
]


@pytest.mark.parametrize(
    "name", ["helpful-base.test.jsonl.gz", "helpful-base/test.jsonl", "a/helpful-base/test.jsonl.gz"]
)
def test_hh(tmp_path, name):
    write(tmp_path / name, HH)
    both = load_hh(tmp_path)
    assert list(both["prompt"]) == [ASK, LONG]  # equal responses and differing dialogues are left out
    assert list(both["chosen"]) == [" There, I think.", " Ours."] and both["rejected"][0] == " No."
    assert list(load_hh(tmp_path, single_turn=True)["prompt"]) == [ASK]
    data.check_comparisons(both)
    found = longer_is_chosen(both)
    assert (found["share"], found["pairs"]) == (0.5, 2) and found["low"] < 0.5 < found["high"]


def test_tldr(tmp_path, monkeypatch):
    folder = tmp_path / "openai_summarize_tldr" / "data"
    folder.mkdir(parents=True)
    rows = [
        {"prompt": "POST: I lost it.\n\nTL;DR:", "label": "Lost it."},
        {"prompt": "POST: Found\nit.", "label": " Found\nit. "},
        {"prompt": "POST: None.", "label": " "},
    ]
    pd.DataFrame(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    monkeypatch.setenv("RLHF_EDU_HUMAN", str(tmp_path))
    found = load_tldr()
    assert list(found["completion"]) == [" Lost it.", " Found it."]
    assert all(p.endswith("\n\nTL;DR:") for p in found["prompt"])


def test_summary_comparisons(tmp_path):
    rows = [
        {"prompt": "POST: x", "chosen": "TL;DR: one two three four five", "rejected": "TL;DR: 1 2 3 4 5 6"},
        {
            "prompt": "POST: y",
            "chosen": "TL;DR: one two three four five",
            "rejected": "one two three four five",
        },
        {"prompt": "POST: z", "chosen": "TL;DR: too short", "rejected": "TL;DR: 1 2 3 4 5 6"},
    ]
    write(tmp_path / "openai_summarize_comparisons" / "test.jsonl", rows)
    found = load_summary_comparisons(tmp_path)
    assert list(found["prompt"]) == ["POST: x\n\nTL;DR:"] and list(found["chosen"]) == [
        " one two three four five"
    ]
    assert len(load_summary_comparisons(tmp_path, shortest=0)) == 2


def test_samples_and_annotators(tmp_path):
    pd.DataFrame(
        {"model_type": ["sft"], "context": ["Post.\n\nTL;DR:"], "ref_text": ["NA"], "sample": ["It is."]}
    ).to_csv(tmp_path / "tldr_samples.csv")
    row = load_summary_samples(tmp_path).iloc[0]
    assert (row["model"], row["reference"], row["summary"]) == ("sft", " NA", " It is.")
    judged = {"instruction": "Say", "input": "", "response1": "a", "response2": "b"}
    judged |= {"annotator1": 0, "annotator2": 1, "annotator3": 2}
    unquoted = judged | {"response1": True}  # as six of the published ones are
    (tmp_path / "testset-v1.json").write_text(json.dumps([judged, unquoted]))
    table, labels = load_pandalm(tmp_path)
    assert labels == [["tie"] * 2, ["A"] * 2, ["B"] * 2] and table["prompt"][0] == "Say"
    assert list(table["first"]) == ["a", "true"]


def test_bad_files_are_explained(tmp_path, monkeypatch, one_sentence):
    monkeypatch.delenv("RLHF_EDU_HUMAN", raising=False)
    with one_sentence("RLHF_EDU_HUMAN"):
        load_hh()
    with one_sentence("holds no", "helpful-base.test.jsonl"):
        load_hh(tmp_path)
    path = tmp_path / "helpful-base.test.jsonl.gz"
    write(path, [{"chosen": "x"}])
    with one_sentence("row 1", "'rejected'"):
        load_hh(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with one_sentence("reading", "fetch the file again"):
        load_hh(tmp_path)
    write(path, [HH[2]])
    with one_sentence("after the filters"):
        load_hh(tmp_path)
    with one_sentence("Anthropic/hh-rlhf", "name a folder"):
        load_hh("hub")  # the tests have no network
    with one_sentence("not fetched from the hub"):
        load_summary_samples("hub")
    (tmp_path / "testset-v1.json").write_text('[{"instruction": ["a list"]}]')
    with one_sentence("row 1: 'input' is missing; fetch the file again"):
        load_pandalm(tmp_path)
    with pytest.raises(
        UserError, match="fetch the file again$"
    ):  # and no word of a hub that has no such file
        load_pandalm(tmp_path)


@pytest.fixture
def folder():
    if not (found := os.environ.get("RLHF_EDU_HUMAN")):
        pytest.skip("RLHF_EDU_HUMAN names no folder")
    return found


def test_real_dialogues(folder):
    both, single = load_hh(folder), load_hh(folder, single_turn=True)
    longer = longer_is_chosen(single)
    print(f"\nhelpful-base test: {len(both)} comparisons, {len(single)} of one turn; longer chosen {longer}")
    assert len(both) > 2300 and 600 < len(single) < 700
    assert all(p.startswith("\n\nHuman:") and p.count("\n\nHuman:") == 1 for p in single["prompt"])


def test_real_summaries(folder):
    table = load_summary_samples(folder)
    assert len(table) == 1200 and table["model"].nunique() == 12 and table["prompt"].nunique() == 100


def test_real_annotators(folder):
    table, labels = load_pandalm(folder)
    agreement, kappa = percent_agreement(*labels), fleiss_kappa(*labels)
    print(f"\nPandaLM: {len(table)} pairs, agreement {agreement}, kappa {kappa}")
    assert len(table) == 999 and 0.6 < agreement.value < 0.95 and kappa.value > 0.4
