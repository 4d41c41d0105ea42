"""Labels on disk: nothing that was given is lost, whatever happens to the program, the file or the disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from rlhf_edu import labelling
from rlhf_edu.labelling import (
    LabelFile,
    LabelPanel,
    Pair,
    comparisons_of,
    draw_pairs,
    read_labels,
    simulated_labels,
)
from rlhf_edu.rewards import Labeler

PAIRS = [Pair(f"Film {i}", " was great.", " was awful.", (0.9, 0.1), (4, 4)) for i in range(6)]
needs_a_mortal = pytest.mark.skipif(
    os.name == "nt" or getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write anywhere"
)


@pytest.fixture
def file(tmp_path):
    return LabelFile(tmp_path / "ada.jsonl", PAIRS)


def lines(file):
    return file.path.read_bytes().split(b"\n")


# --- the file ---


def test_labels_come_back_in_the_order_of_the_pairs(file):
    assert not file.path.exists() and file.next() == PAIRS[0] and file.labels() == [None] * 6
    for choice in ("first", "second", "tie", "skip"):
        file.record(file.next(), choice)
    assert file.labels() == ["first", "second", "tie", None, None, None]
    assert file.done() == 4 and file.next() == PAIRS[4]
    again = LabelFile(file.path, PAIRS)  # another session
    assert again.labels() == file.labels() and again.next() == PAIRS[4] and again.report() == ""


def test_each_label_is_one_line_that_says_what_was_shown(file):
    file.record(PAIRS[0], "second", seconds=3.14159)
    (line, rest) = lines(file)
    row = json.loads(line)
    assert rest == b"" and row["pair"] == PAIRS[0].id and row["choice"] == "second" and row["seconds"] == 3.14
    assert row["left"] == file.left_of(PAIRS[0]) and row["at"].endswith("+00:00")


def test_undo_writes_a_line_and_deletes_none(file):
    for choice in ("first", "tie"):
        file.record(file.next(), choice)
    before = file.path.read_bytes()
    assert file.undo() == PAIRS[1]
    assert file.path.read_bytes().startswith(before) and b'"undo"' in file.path.read_bytes()
    assert file.next() == PAIRS[1] and file.labels()[:2] == ["first", None]
    file.record(PAIRS[1], "second")
    assert file.labels()[:2] == ["first", "second"]
    assert [file.undo() for _ in range(3)] == [PAIRS[1], PAIRS[0], None]
    assert file.labels() == [None] * 6 and file.report() == ""


def test_undo_takes_back_what_was_labelled_last_not_what_stands_last(file):
    file.record(PAIRS[3], "first")
    file.record(PAIRS[0], "first")
    file.record(PAIRS[3], "second")  # labelled again, say in a second window
    assert file.labels()[3] == "second" and file.done() == 2
    assert file.undo() == PAIRS[3] and file.labels()[3] is None and file.undo() == PAIRS[0]


def test_the_side_is_random_recorded_and_stays(tmp_path):
    many = [Pair(f"Film {i}", " a", " b") for i in range(400)]
    file = LabelFile(tmp_path / "x.jsonl", many, seed=3)
    sides = [file.left_of(p) for p in many]
    assert 160 < sides.count("first") < 240
    assert sides == [LabelFile(tmp_path / "y.jsonl", many[::-1], seed=3).left_of(p) for p in many]
    assert sides != [LabelFile(tmp_path / "x.jsonl", many, seed=4).left_of(p) for p in many]


def test_two_people_have_two_files(tmp_path):
    ada, bob = (LabelFile(tmp_path / f"{name}.jsonl", PAIRS) for name in ("ada", "bob"))
    ada.record(PAIRS[0], "first")
    assert bob.next() == PAIRS[0] and (ada.name, bob.name) == ("ada", "bob")


def test_two_windows_on_one_file_see_each_other(file):
    other = LabelFile(file.path, PAIRS)
    file.record(PAIRS[0], "first")
    other.record(other.next(), "tie")
    assert file.next() == other.next() == PAIRS[2] and file.labels()[:2] == ["first", "tie"]


# --- damage ---


@pytest.mark.parametrize("keep", [1, 20, -2])
def test_a_line_cut_short_is_reported_and_does_not_swallow_the_next(file, keep):
    for choice in ("first", "second"):
        file.record(file.next(), choice)
    whole = file.path.read_bytes()
    start = whole.index(b"\n") + 1
    file.path.write_bytes(whole[: start + keep] if keep > 0 else whole[:keep])  # the second line is cut
    cut = file.path.read_bytes()
    again = LabelFile(file.path, PAIRS)
    assert again.labels()[:2] == ["first", None] and again.next() == PAIRS[1]
    assert "line 2" in again.report() and "ada.jsonl" in again.report() and "\n" not in again.report()
    again.record(PAIRS[1], "tie")
    again.record(PAIRS[2], "first")
    assert again.labels()[:3] == ["first", "tie", "first"]
    assert file.path.read_bytes().startswith(cut + b"\n")  # the broken line is still there, alone
    assert again.report().count("line") == LabelFile(file.path, PAIRS).report().count("line")
    assert [n for n, _ in read_labels(file.path).damaged] == [2]


def test_a_last_line_that_lacks_only_its_end_still_counts(file):
    file.record(PAIRS[0], "first")
    file.path.write_bytes(file.path.read_bytes()[:-1])
    assert file.labels()[0] == "first"
    file.record(PAIRS[1], "tie")
    assert file.labels()[:2] == ["first", "tie"] and file.report() == ""


GOOD_LINE = json.dumps({"action": "label", "pair": PAIRS[5].id, "choice": "tie", "left": "first"}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 40,
        b"\xff\xfe\x80",
        b"not json",
        b"[" * 100_000,
        b"[1, 2]",
        b"7",
        b'{"action": "label"}',
        b'{"action": "label", "pair": ["x"], "choice": "first", "left": "first"}',
        GOOD_LINE.replace(b"tie", b"maybe"),
        GOOD_LINE.replace(b'"first"', b"null"),
        GOOD_LINE.replace(b'"label"', b'"delete"'),
        b'{"action": "undo", "pair": "of nothing"}',
        GOOD_LINE + GOOD_LINE,
    ],
)
def test_every_kind_of_damage_costs_its_own_line_only(file, damage):
    file.record(PAIRS[0], "first")
    content = file.path.read_bytes() + damage + b"\n" + GOOD_LINE + b"\n"
    file.path.write_bytes(content)
    again = LabelFile(file.path, PAIRS)
    assert again.labels() == ["first", None, None, None, None, "tie"]
    report = again.report()
    assert "line 2" in report and len(report) < 300 and "\n" not in report
    again.record(again.next(), "second")
    assert again.labels()[1] == "second" and file.path.read_bytes().startswith(content)


def test_an_editor_that_adds_a_mark_carriage_returns_and_empty_lines_does_no_harm(file):
    file.path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n\r\n\n")
    assert file.labels()[5] == "tie" and file.report() == ""


def test_labels_of_other_pairs_are_kept_and_said(file):
    file.record(PAIRS[0], "first")
    other = LabelFile(file.path, [Pair("Another film", " x", " y"), PAIRS[1]])
    assert other.labels() == [None, None] and other.done() == 0 and other.undo() is None
    assert "1 label of pairs that are not in this list" in other.report()
    other.record(other.next(), "tie")
    assert file.labels()[0] == "first"


# --- the program dies, the disk is full, the folder is locked ---


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_kill_9_loses_no_label_that_was_acknowledged(file):
    program = """
        import sys
        from rlhf_edu.labelling import LabelFile, Pair
        pairs = [Pair(f"Film {i}", " was great.", " was awful.") for i in range(5000)]
        file = LabelFile(sys.argv[1], pairs)
        for pair in pairs:
            file.record(pair, ("first", "second", "tie")[int(pair.prompt[5:]) % 3])
            print(pair.prompt[5:], flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(file.path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        seen = [int(child.stdout.readline()) for _ in range(25)]
        child.send_signal(signal.SIGKILL)
        seen += [int(line) for line in child.stdout.read().split()]
    pairs = [Pair(f"Film {i}", " was great.", " was awful.") for i in range(5000)]
    again = LabelFile(file.path, pairs)
    labels = again.labels()
    assert seen == list(range(len(seen))) and len(seen) >= 25
    assert labels[: len(seen)] == [("first", "second", "tie")[i % 3] for i in seen]
    assert (
        again.next() in pairs[len(seen) : len(seen) + 2]
    )  # at most the one that was being written is further
    again.record(again.next(), "tie")
    assert len(read_labels(file.path).damaged) <= 1


def test_the_label_is_on_disk_before_record_returns(file, monkeypatch):
    synced = []
    monkeypatch.setattr(labelling.os, "fsync", lambda fd: synced.append(file.path.read_bytes()))
    file.record(PAIRS[0], "first")
    assert synced and json.loads(synced[0])["pair"] == PAIRS[0].id


class AlmostFull:
    """A file on a disk that takes `room` more bytes."""

    def __init__(self, real, room):
        self.real, self.room = real, room

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.real.write(content[: self.room])
        self.room -= taken
        return taken

    def fileno(self):
        return self.real.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.real.close()


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_is_one_sentence_and_costs_no_earlier_label(file, monkeypatch, one_sentence, room):
    file.record(PAIRS[0], "first")
    before = file.path.read_bytes()
    real_open = open
    monkeypatch.setattr(
        labelling, "open", lambda p, mode, **k: AlmostFull(real_open(p, mode, **k), room) if mode == "ab" else real_open(p, mode, **k),
        raising=False,
    )  # fmt: skip
    with one_sentence("ada.jsonl", "no space left", "not kept"):
        file.record(PAIRS[1], "second")
    monkeypatch.undo()
    assert file.path.read_bytes().startswith(before) and file.labels()[:2] == ["first", None]
    file.record(file.next(), "second")  # space was freed
    assert file.labels()[:2] == ["first", "second"] and len(read_labels(file.path).damaged) == (room > 0)


def test_a_write_taken_in_parts_is_completed(file, monkeypatch):
    real_open = open

    class Slow(AlmostFull):
        def write(self, content):
            return self.real.write(content[:7])

    monkeypatch.setattr(
        labelling, "open", lambda p, mode, **k: Slow(real_open(p, mode, **k), 0) if mode == "ab" else real_open(p, mode, **k),
        raising=False,
    )  # fmt: skip
    file.record(PAIRS[0], "first")
    assert file.labels()[0] == "first"


@needs_a_mortal
def test_a_locked_folder_is_one_sentence(tmp_path, one_sentence):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with one_sentence("Permission denied", "another file"):
        LabelFile(folder / "ada.jsonl", PAIRS).record(PAIRS[0], "first")


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, one_sentence):
    (tmp_path / "labels").write_text("")
    with one_sentence("labels", "another file"):
        LabelFile(tmp_path / "labels" / "ada.jsonl", PAIRS).record(PAIRS[0], "first")


def test_errors_of_the_system_are_one_sentence(file, monkeypatch, one_sentence):
    def locked(path, mode="r", **_):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(labelling, "open", locked, raising=False)
    with one_sentence("Read-only file system", "not kept"):
        file.record(PAIRS[0], "first")
    monkeypatch.undo()
    monkeypatch.setattr(
        labelling.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    with one_sentence("Input/output error", "not kept"):
        file.record(PAIRS[0], "first")


def test_a_path_that_cannot_be_read_is_one_sentence(tmp_path, one_sentence):
    with one_sentence("cannot be read"):
        LabelFile(tmp_path, PAIRS)


def test_what_a_caller_gets_wrong_is_one_sentence(file, tmp_path, one_sentence):
    with one_sentence("'better'"):
        file.record(PAIRS[0], "better")
    with one_sentence("no pair"):
        LabelFile(tmp_path / "x.jsonl", [])
    with one_sentence("1 of the pairs stand twice"):
        LabelFile(tmp_path / "x.jsonl", [*PAIRS, PAIRS[0]])
    assert not file.path.exists()


# --- pairs and what comes of the labels ---


def completions(n):
    return [
        {"prompt": f"Film {i}", "responses": [" a", f" b{i}", " a", " c"], "rewards": [0.1, 0.2, 0.1, 0.9], "lengths": [2, 2, 2, 2]}
        for i in range(n)
    ]  # fmt: skip


def test_drawn_pairs_differ_come_from_different_prompts_and_follow_the_seed(one_sentence):
    pairs = draw_pairs(completions(60), 50, seed=1)
    assert len({p.prompt for p in pairs}) == 50 and all(p.first != p.second for p in pairs)
    reward = {"a": 0.1, "b": 0.2, "c": 0.9}
    assert all(p.rewards == (reward[p.first[1]], reward[p.second[1]]) for p in pairs)
    assert pairs == draw_pairs(completions(60), 50, seed=1) != draw_pairs(completions(60), 50, seed=2)
    with one_sentence("only"):
        draw_pairs(completions(3), 4)


def test_simulated_labels_and_comparisons(one_sentence):
    pairs = [*PAIRS[:3], Pair("Film", " dull", " fun and long", (0.2, 0.7), (2, 5))]
    assert simulated_labels(pairs, Labeler()) == ["first", "first", "first", "second"]
    assert simulated_labels(pairs, Labeler(length_preference=-9)) == [
        *simulated_labels(PAIRS[:3], Labeler()),
        "first",
    ]
    table = comparisons_of(pairs, ["second", "tie", None, "second"])
    assert table["chosen"][:] == [" was awful.", " fun and long"] and table["rejected"][:] == [
        " was great.",
        " dull",
    ]
    with one_sentence("no pair has a label"):
        comparisons_of(pairs, ["tie", None, None, "tie"])
    noisy = simulated_labels([Pair(str(i), "a", "b", (0.6, 0.4)) for i in range(4000)], Labeler(0.2))
    assert np.mean([n == "first" for n in noisy]) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)


# --- the panel ---


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def panel(file):
    clock = Clock()
    return LabelPanel(file, "Which is more <positive>?", clock=clock), clock


def text_of(panel, name):
    return panel.sides[name].value


def test_buttons_label_the_response_that_was_shown_on_that_side(panel, file):
    panel, clock = panel
    for key in "abtsab":
        pair = panel.pair
        left = file.left_of(pair)
        assert "great" in text_of(panel, "A" if left == "first" else "B")
        clock.now += 2
        panel.buttons[key].click()
        row = json.loads(lines(file)[-2])
        expected = {"a": left, "b": "first" if left == "second" else "second", "t": "tie", "s": "skip"}[key]
        assert (row["pair"], row["choice"], row["left"], row["seconds"]) == (pair.id, expected, left, 2.0)
    assert panel.pair is None and "All pairs are done" in panel.prompt.value
    assert panel.progress.value == 6 and panel.count.value == "6 of 6 done"
    assert [panel.buttons[k].disabled for k in "abtsu"] == [True, True, True, True, False]
    panel.press("a")  # nothing to label
    assert len(lines(file)) == 7


def test_keys_label_and_the_field_empties_itself(panel, file):
    panel, clock = panel
    for key in ("t", "T ", "a"):
        clock.now += 2
        panel.keys.value = key
        assert panel.keys.value == ""
    assert file.done() == 3 and file.labels()[:2] == ["tie", "tie"]
    clock.now += 2
    panel.keys.value = "x"
    panel.keys.value = "ab"  # typed ahead: which pair was meant?
    assert file.done() == 3 and "One key at a time" in panel.message.value and panel.keys.value == ""
    panel.keys.value = "u"
    assert file.done() == 2 and "Taken back" in panel.message.value


def test_undo_shows_that_pair_again(panel, file):
    panel, clock = panel
    assert panel.buttons["u"].disabled
    panel.press("u")
    assert "nothing to take back" in panel.message.value
    clock.now += 2
    panel.press("a")
    panel.press("u")
    assert panel.pair == PAIRS[0] and file.labels() == [None] * 6 and panel.progress.value == 0


def test_a_double_click_labels_one_pair(panel, file):
    panel, clock = panel
    clock.now += 2
    panel.press("a")
    clock.now += 0.1
    panel.press("a")
    assert file.done() == 1 and "quicker" in panel.message.value
    clock.now += 1
    panel.press("a")
    assert file.done() == 2 and "quicker" not in panel.message.value


def test_a_label_that_cannot_be_written_leaves_the_pair_on_show(panel, file, monkeypatch):
    panel, clock = panel
    clock.now += 2

    def full(row):
        raise labelling.UserError("writing failed (no space left); free some space")

    monkeypatch.setattr(file, "_append", full)
    panel.press("a")
    assert panel.pair == PAIRS[0] and "no space left" in panel.message.value and panel.progress.value == 0
    monkeypatch.undo()
    panel.press("a")
    assert file.done() == 1 and "no space" not in panel.message.value


def test_the_panel_reports_damage_and_hides_what_a_labeler_must_not_know(file):
    file.path.write_bytes(b"broken\n")
    panel = LabelPanel(file, "Which?")
    assert "line 1" in panel.message.value
    shown = " ".join(w.value for w in (panel.prompt, *panel.sides.values()))
    assert "0.9" not in shown and "0.1" not in shown


def test_texts_are_shown_as_texts(tmp_path):
    panel = LabelPanel(LabelFile(tmp_path / "x.jsonl", [Pair("<b>Film", " <script>", " &amp;")]), "<?>")
    assert "<script>" not in panel.sides["A"].value + panel.sides["B"].value
    assert "&lt;b&gt;Film" in panel.prompt.value and "&lt;?&gt;" in panel.question.value


def test_what_a_saved_notebook_keeps_is_readable_without_widgets(panel, monkeypatch):
    view = "application/vnd.jupyter.widget-view+json"
    bundle = panel[0]._repr_mimebundle_()  # nobody is there, as when a program runs the notebook
    assert "0 of 6" in bundle["text/html"] and view not in bundle
    assert (
        repr(panel[0]) == "Labelling panel of ada.jsonl: 0 of 6 pairs done"
        and repr(panel[0]) in bundle["text/plain"]
    )
    monkeypatch.setattr(labelling, "someone_is_there", lambda: True)
    assert panel[0]._repr_mimebundle_()[view]["model_id"] == panel[0].box.model_id
