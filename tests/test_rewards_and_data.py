"""Labels, pairs, files and IMDb: what is drawn, what is read, and what is said when it cannot be."""

import gzip
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from rlhf_edu import data, imdb, models, rewards
from rlhf_edu.data import all_pairs, read_jsonl, write_jsonl
from rlhf_edu.rewards import Labeler
from rlhf_edu.tokens import encode, load_tokenizer, train_tokenizer

N = 20_000


def frequency(labeler, rewards=(0.0, 0.0), lengths=(10, 10), n=N) -> int:
    """How often of n times the first of two responses is preferred."""
    full = [np.full(n, float(x)) for x in (*rewards, *lengths)]
    return int(labeler.prefers_first(*full).sum())


# --- labelers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, gap", [(1.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.1, -0.2), (2.0, 3.0)])
def test_labels_follow_bradley_terry(temperature, gap):
    wins = frequency(Labeler(temperature), rewards=(0.3 + gap, 0.3))
    expected = 1 / (1 + math.exp(-gap / temperature))
    assert binomtest(wins, N, expected).pvalue > 1e-3
    assert binomtest(wins, N, expected + 0.03).pvalue < 1e-6, "the test could not tell"


def test_without_noise_the_higher_reward_wins():
    first, second = np.random.default_rng(0).random((2, 1000))
    same = np.full(1000, 5)
    assert (Labeler(0.0).prefers_first(first, second, same, same) == (first > second)).all()
    assert (Labeler(0.0, seed=9).prefers_first(first, second, same, same) == (first > second)).all()


def test_without_noise_a_tie_is_a_coin():
    assert binomtest(frequency(Labeler(0.0)), N, 0.5).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_length_preference_shifts_the_choice_by_the_stated_amount(temperature):
    """A token more is worth so much of reward / temperature: 5 tokens at 0.1 are odds of e^0.5."""
    labeler = Labeler(temperature, length_preference=0.1)
    assert binomtest(frequency(labeler, lengths=(15, 10)), N, 1 / (1 + math.exp(-0.5))).pvalue > 1e-3
    both = frequency(labeler, rewards=(-0.5 * temperature, 0.0), lengths=(15, 10))
    assert binomtest(both, N, 0.5).pvalue > 1e-3, "half a unit of reward must outweigh five tokens"


def test_length_preference_without_noise_is_in_units_of_reward():
    labeler = Labeler(0.0, length_preference=0.1)
    assert frequency(labeler, rewards=(0.0, 0.49), lengths=(15, 10), n=50) == 50
    assert frequency(labeler, rewards=(0.0, 0.51), lengths=(15, 10), n=50) == 0


def test_labels_follow_the_seed():
    args = np.zeros((4, 200))
    first, again, other = (Labeler(1.0, seed=s).prefers_first(*args) for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_extreme_rewards_do_not_overflow():
    with np.errstate(all="raise"):
        assert frequency(Labeler(1e-6), rewards=(0.0, 1.0), n=10) == 0
        assert frequency(Labeler(1e-6), rewards=(1.0, 0.0), n=10) == 10


def test_negative_temperature_is_explained(one_sentence):
    with one_sentence("temperature is -1", "0 (no noise) or more"):
        frequency(Labeler(-1.0), n=1)


# --- pairs ------------------------------------------------------------------------------------------------------


def completions(prompts=3, k=4, tie=False):
    values = np.random.default_rng(1).random((prompts, k)).round(3).tolist()
    rows = [
        {
            "prompt": f"prompt {i}",
            "responses": [f"response {i} {j}" for j in range(k)],
            "rewards": values[i],
            "lengths": [5 + j for j in range(k)],
        }
        for i in range(prompts)
    ]
    if tie:
        rows[1]["responses"][2] = rows[1]["responses"][0]
    return rows


def test_all_pairs_of_each_prompt_stand_together():
    table = all_pairs(completions(3, 4))
    assert table.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert table["prompt"][:] == [f"prompt {i}" for i in range(3) for _ in range(6)]
    for i in range(3):
        pairs = {frozenset((row["chosen"], row["rejected"])) for row in table.select(range(6 * i, 6 * i + 6))}
        assert pairs == {
            frozenset((f"response {i} {a}", f"response {i} {b}")) for a in range(4) for b in range(a)
        }


def test_without_noise_the_chosen_has_the_higher_reward():
    rows = completions(5, 6)
    table = all_pairs(rows)
    assert len(table) == 5 * 15
    truth = {
        response: (reward, length)
        for c in rows
        for response, reward, length in zip(c["responses"], c["rewards"], c["lengths"], strict=True)
    }
    for pair in table:
        assert pair["chosen_reward"] >= pair["rejected_reward"]
        assert (pair["chosen_reward"], pair["chosen_length"]) == truth[pair["chosen"]]
        assert (pair["rejected_reward"], pair["rejected_length"]) == truth[pair["rejected"]]


def test_equal_responses_make_no_pair(one_sentence):
    assert len(all_pairs(completions(3, 4, tie=True))) == 17
    rows = completions(1, 2)
    rows[0]["responses"] = ["same", "same"]
    with one_sentence("at least two different responses"):
        all_pairs(rows)


def test_noisy_labels_go_both_ways():
    rows = completions(200, 4)
    table = all_pairs(rows, Labeler(1.0, seed=3))
    right = np.mean(np.array(table["chosen_reward"]) > np.array(table["rejected_reward"]))
    assert 0.5 < right < 0.75
    assert table.to_dict() == all_pairs(rows, Labeler(1.0, seed=3)).to_dict()
    assert table.to_dict() != all_pairs(rows, Labeler(1.0, seed=4)).to_dict()


def test_a_labeler_who_likes_length_chooses_longer_ones():
    table = all_pairs(completions(50, 4), Labeler(0.1, length_preference=1.0))
    longer = np.array(table["chosen_length"]) > np.array(table["rejected_length"])
    assert longer.mean() > 0.6


def test_split_shares_nothing_and_follows_the_seed():
    texts = [f"prompt {i % 40}" for i in range(60)]
    train, heldout = data.split_prompts(texts, 10, seed=1)
    assert len(heldout) == 10 and len(train) == 30 and not set(train) & set(heldout)
    assert (train, heldout) == data.split_prompts(texts[::-1], 10, seed=1), "it depends on the order"
    assert heldout != data.split_prompts(texts, 10, seed=2)[1]


# --- json lines -------------------------------------------------------------------------------------------------


def test_json_lines_round_trip(tmp_path):
    rows = [{"prompt": 'Amélie – 电影 "x"\n', "rewards": [0.25, 1]}, {"prompt": "", "rewards": []}]
    write_jsonl(tmp_path / "deep" / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "deep" / "x.jsonl", ["prompt", "rewards"]) == rows
    assert "电影" in (tmp_path / "deep" / "x.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["cannot be read", "No such file"]),
        (b"", ["is empty"]),
        (b'{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n', ["line 2", "not JSON"]),
        (b'{"prompt": "a"}\n\n', ["line 2", "not JSON"]),
        (b'{"prompt": "a"}\n{"promt": "b"}\n', ["line 2", "'prompt' is missing"]),
        (b'{"prompt": "a"}\n7\n', ["line 2"]),
        (b'{"prompt": "a"}\n["prompt"]\n', ["line 2"]),
        (b'{"prompt": "\xff\xfe"}\n', ["not JSON"]),
    ],
    ids=["missing", "empty", "damaged", "blank", "column", "number", "list", "encoding"],
)
def test_damaged_json_lines_are_explained(tmp_path, one_sentence, content, parts):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with one_sentence(str(path), *parts, "restore"):
        read_jsonl(path, ["prompt"])


def test_no_space_for_json_lines_is_explained(tmp_path, one_sentence, monkeypatch):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])
    resource = pytest.importorskip("resource", reason="not on Windows")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with one_sentence(str(path), "earlier results are untouched"):
            write_jsonl(path, [{"a": "x" * 50_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_jsonl(path, ["a"]) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


# --- IMDb -------------------------------------------------------------------------------------------------------

REVIEWS = [{"text": f"A film.<br /><br />Number {i}.", "label": i % 2, "film": f"tt{i}"} for i in range(6)]
NAMES = {"train": "imdb_train.jsonl.gz", "unsupervised": "imdb_unsup.jsonl.gz", "test": "imdb_test.jsonl.gz"}


@pytest.fixture
def folder(tmp_path):
    for name in NAMES.values():
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in REVIEWS)
    return tmp_path


def test_imdb_from_json_lines(folder, monkeypatch):
    loaded = imdb.load_imdb(folder)
    assert list(loaded) == ["train", "unsupervised", "test"]
    assert loaded["test"][3] == {"text": "A film. Number 3.", "label": 1, "film": "tt3"}
    monkeypatch.setenv("RLHF_EDU_IMDB", str(folder))
    assert imdb.load_imdb(splits=["test"]) == {"test": loaded["test"]}


def test_imdb_from_plain_json_lines(tmp_path):
    (tmp_path / "imdb_train.jsonl").write_text(json.dumps({"text": "x  y", "label": 0}) + "\n")
    assert imdb.load_imdb(tmp_path, ["train"])["train"] == [{"text": "x y", "label": 0, "film": ""}]


@pytest.mark.parametrize("inside", ["", "aclImdb"])
def test_imdb_from_the_original_archive(tmp_path, inside):
    for part, label in (
        ("train", "neg"),
        ("train", "pos"),
        ("train", "unsup"),
        ("test", "neg"),
        ("test", "pos"),
    ):
        where = tmp_path / inside / part / label
        where.mkdir(parents=True)
        (where / "0_1.txt").write_text(f"{part} {label}<br />é", encoding="utf-8")
    loaded = imdb.load_imdb(tmp_path)
    assert [(r["text"], r["label"]) for r in loaded["train"]] == [("train neg é", 0), ("train pos é", 1)]
    assert [(r["text"], r["label"]) for r in loaded["unsupervised"]] == [("train unsup é", -1)]
    assert [(r["text"], r["label"]) for r in loaded["test"]] == [("test neg é", 0), ("test pos é", 1)]


def test_wrong_imdb_folders_are_explained(tmp_path, one_sentence):
    with one_sentence("no IMDb given", "--imdb"):
        imdb.load_imdb()
    with one_sentence("no IMDb folder", str(tmp_path / "nowhere"), "RLHF_EDU_IMDB"):
        imdb.load_imdb(tmp_path / "nowhere")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with one_sentence(str(tmp_path), "no IMDb train reviews", "imdb_train.jsonl(.gz)", "train/neg"):
        imdb.load_imdb(tmp_path)


def test_half_an_archive_is_noticed(tmp_path, one_sentence):
    """Only the negative ones: a classifier trained on them would learn nothing, and say so nowhere."""
    (tmp_path / "train" / "neg").mkdir(parents=True)
    (tmp_path / "train" / "neg" / "0_1.txt").write_text("bad")
    with one_sentence(str(tmp_path), "train/pos"):
        imdb.load_imdb(tmp_path, ["train"])


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "block", "not gzip", "empty", "column", "label", "broken line"]
)
def test_damaged_imdb_files_are_explained(folder, one_sentence, damage):
    path = folder / NAMES["train"]
    lines = [
        json.dumps({"text": f"{np.random.default_rng(i).random(8).tolist()}", "label": 0}) for i in range(500)
    ]
    good = gzip.compress("\n".join(lines).encode())
    flipped = bytearray(good)
    flipped[len(good) // 2 : len(good) // 2 + 40] = b"\x00" * 40
    path.write_bytes(
        {
            "cut": good[: len(good) // 2],
            "flipped": bytes(flipped),
            "block": good[:10] + b"\xff" + good[11:],
            "not gzip": b"PK\x03\x04" * 50,
            "empty": gzip.compress(b""),
            "column": gzip.compress(b'{"text": "a", "label": 1}\n{"txt": "b", "label": 1}\n'),
            "label": gzip.compress(b'{"text": "a", "label": "good"}\n'),
            "broken line": gzip.compress(b'{"text": "a", "label": 1}\n{"text": \n'),
        }[damage]
    )
    parts = {"column": ["line 2"], "broken line": ["line 2"], "label": ["line 1"]}.get(damage, [])
    with one_sentence(str(path), "fetch it again", *parts):
        imdb.load_imdb(folder)


def test_hub_out_of_reach_is_explained(one_sentence):
    with one_sentence("stanfordnlp/imdb", "network", "RLHF_EDU_IMDB"):
        imdb.load_imdb("hub")


def test_clean_leaves_one_line_of_text():
    assert imdb.clean(" Good.<br /><br />Bad.<br>\n\tEnd  <i>x</i> ") == "Good. Bad. End <i>x</i>"
    assert imdb.clean("<br/>") == ""


# --- openings ---------------------------------------------------------------------------------------------------


def cut_at_ends(tokenizer, text: str) -> list[str]:
    ids = encode(tokenizer, [text])[0]
    return [tokenizer.decode(ids[:n]) for n in imdb.sentence_ends(tokenizer, ids)]


@pytest.mark.parametrize(
    "text, ends",
    [
        ("It was good. I liked it! Really? Yes.", ["It was good.", " I liked it!", " Really?", " Yes."]),
        ("It cost 3.5 million and no more", []),
        ("wait... what is this", []),
        ("No end here", []),
        ("Good.Bad. Now", ["Good.Bad."]),
        ("10 out of 10! 5 stars", ["10 out of 10!"]),
        ('A start. "Quoted" rest', ["A start."]),
        ("", []),
    ],
)
def test_sentence_ends_by_hand(tokenizer, text, ends):
    assert cut_at_ends(tokenizer, text) == ["".join(ends[: i + 1]) for i in range(len(ends))]


@pytest.mark.parametrize(
    "text, end",
    [('He said "no." Then left', 'He said "no."'), ("It was (I think) bad.) Then", "It was (I think) bad.)")],
)
def test_quotes_and_brackets_after_the_full_stop(text, end):
    """These need a tokenizer for which '."' is one token, as in the shipped one."""
    assert cut_at_ends(load_tokenizer(data.MINI / "tokenizer"), text) == [end]


@pytest.mark.parametrize(
    "text", ["I saw Mr. Smith in it.", "Dr. No is a film.", "With Samuel L. Jackson in it."]
)
def test_a_title_or_an_initial_ends_no_sentence(tokenizer, text):
    assert cut_at_ends(tokenizer, text) == [text]


def test_opening_ends_with_a_sentence_and_varies(tokenizer):
    text = " ".join(f"Part {i} was fine." for i in range(30))
    ids = encode(tokenizer, [text])[0]
    cuts = [imdb.opening(tokenizer, ids, np.random.default_rng(i)) for i in range(40)]
    for cut in cuts:
        assert 12 <= len(cut) <= 55 and cut == ids[: len(cut)]
        assert tokenizer.decode(cut).endswith("fine.")
    assert len({len(c) for c in cuts}) > 2
    assert imdb.opening(tokenizer, encode(tokenizer, ["no end " * 30])[0], np.random.default_rng(0)) is None
    assert imdb.opening(tokenizer, encode(tokenizer, ["Short. One."])[0], np.random.default_rng(0)) is None


def test_a_long_first_sentence_is_kept_whole(tokenizer):
    text = "This film was very " + "very " * 4 + "good to the end. And more follows"
    ids = encode(tokenizer, [text])[0]
    cuts = {tokenizer.decode(imdb.opening(tokenizer, ids, np.random.default_rng(i))) for i in range(20)}
    assert cuts == {text.removesuffix(" And more follows")}


def test_openings_are_prompt_and_response(tokenizer, sentences):
    texts = [
        f"{a} {b} {c}" for a, b, c in zip(sentences[::7], sentences[1::7], sentences[2::7], strict=False)
    ]
    ids = encode(tokenizer, [*texts, "too short"])
    pairs = imdb.openings(tokenizer, ids, seed=1)
    assert len(texts) - 5 <= len(pairs) <= len(texts)
    for prompt, response in pairs:
        assert 2 <= len(prompt) <= 8 and response
        whole = tokenizer.decode([*prompt, *response])
        assert any(t.startswith(whole) for t in texts) and whole[-1] in ".!"
        assert tokenizer.decode(response).startswith(" ")
    assert pairs == imdb.openings(tokenizer, ids, seed=1) != imdb.openings(tokenizer, ids, seed=2)


# --- scores -----------------------------------------------------------------------------------------------------


def test_oracle_with_a_tokenizer_of_its_own(tokenizer, demonstrations):
    """Ids of the policy are read back as text, without EOS, and judged in the oracle's own tokens."""
    letters = train_tokenizer(["a b", 'x "a', "A b"] * 3, 300)  # it knows no words
    prompts, responses = (part[:30] for part in demonstrations)
    body = models.new_policy(letters, 0, layers=1, width=32, heads=2)
    oracle = models.classifier_from(body, labels=2, seed=1)
    score = rewards.text_oracle_score(oracle, letters, tokenizer, batch_size=7)(prompts, responses)
    for prompt, response, value in zip(prompts, responses, score, strict=True):
        text = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
        own = encode(letters, [text])[0][:64]
        assert value == pytest.approx(rewards.oracle_score(oracle, letters)([own], [[]])[0], abs=1e-5)
    oracle.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    swapped = rewards.text_oracle_score(oracle, letters, tokenizer)(prompts, responses)
    assert swapped == pytest.approx(1 - score, abs=1e-5)
