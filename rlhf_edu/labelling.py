"""Label pairs by hand: a file that loses nothing, and a panel of buttons and keys on top of it.

The file has one JSON object a line and is only ever appended to, one labeler a file:

    {"action": "label", "pair": "3f9c...", "choice": "first", "left": "second", "seconds": 4.1, "at": "2025-..."}
    {"action": "undo", "pair": "3f9c..."}

`choice` is "first", "second", "tie" or "skip"; `left` is the response that was shown on the left, as A. A label
is on disk before the next pair is shown. What cannot be read is reported and stays where it is.
"""

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import html
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from .errors import UserError, explained, numbers
from .training import rng
from .widgets import someone_is_there

CHOICES = ("first", "second", "tie", "skip")
CARD = "border:1px solid #9994;border-radius:6px;padding:8px 12px;height:100%;box-sizing:border-box;line-height:1.5"
KEYS = {"a": "A is better", "b": "B is better", "t": "Tie", "s": "Skip", "u": "Undo"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt. What a simulated labeler would have to know comes along and is never shown."""

    prompt: str
    first: str
    second: str
    rewards: tuple[float, float] = (float("nan"), float("nan"))
    lengths: tuple[int, int] = (0, 0)

    @property
    def id(self) -> str:
        """The same for the same three texts, in whatever list the pair stands."""
        return hashlib.sha256(json.dumps([self.prompt, self.first, self.second]).encode()).hexdigest()[:16]


def draw_pairs(completions: Sequence[dict], count: int, seed: int = 0) -> list[Pair]:
    """One random pair of different responses from each of `count` random prompts."""
    if count < 1:
        raise UserError(f"{count} pairs are asked for: take 1 or more")
    generator = rng(seed, 23)
    pairs = []
    for i in generator.permutation(len(completions)):
        c = completions[i]
        different = [
            (a, b)
            for a, b in itertools.permutations(range(len(c["responses"])), 2)
            if c["responses"][a] != c["responses"][b]
        ]
        if different and len(pairs) < count:
            a, b = different[generator.integers(len(different))]
            responses, rewards, lengths = (
                (c[key][a], c[key][b]) for key in ("responses", "rewards", "lengths")
            )
            pairs.append(Pair(c["prompt"], *responses, rewards, lengths))
    if len(pairs) < count:
        raise UserError(
            f"{count} pairs were asked for, but only {len(pairs)} prompts have two responses that differ"
        )
    return pairs


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a label file says when its lines are followed in order."""

    active: dict[str, dict]  # pair id -> the label that counts, the oldest first
    damaged: list[tuple[int, str]]  # (line number, what is wrong with it)


def read_labels(path: str | Path) -> Contents:
    """Follow a label file line by line; lines that cannot be read are reported, never an error. No file: no labels."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): allow this user to read it, or choose another file"
        ) from error
    active: dict[str, dict] = {}
    damaged = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = _checked(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            damaged.append(
                (number, str(error) if isinstance(error, _Damaged) else "not a whole line of JSON")
            )
            continue
        before = active.pop(row["pair"], None)  # a label given later stands later
        if row["action"] == "label":
            active[row["pair"]] = row
        elif before is None:
            damaged.append((number, "it takes back a label that is not there"))
    return Contents(active, damaged)


class _Damaged(ValueError):
    pass


def _checked(row) -> dict:
    if not isinstance(row, dict) or not isinstance(row.get("pair"), str):
        raise _Damaged("it names no pair")
    if row.get("action") not in ("label", "undo"):
        raise _Damaged("it is neither a label nor an undo")
    if row["action"] == "label" and row.get("choice") not in CHOICES:
        raise _Damaged(f"its choice is none of {', '.join(CHOICES)}")
    if row["action"] == "label" and row.get("left") not in CHOICES[:2]:
        raise _Damaged("it does not say which response stood on the left")
    return row


class LabelFile:
    """The labels of one person for a list of pairs, kept in one file. The file is read again before every answer."""

    def __init__(self, path: str | Path, pairs: Sequence[Pair], *, seed: int = 0):
        self.path, self.pairs, self.seed = Path(path), list(pairs), seed
        if not self.pairs:
            raise UserError("there is no pair to label: give at least one")
        twice = [p for p, n in collections.Counter(p.id for p in self.pairs).items() if n > 1]
        if twice:
            raise UserError(f"{len(twice)} of the pairs stand twice in the list: give each pair once")
        read_labels(self.path)  # what cannot be read is said now

    @property
    def name(self) -> str:
        return self.path.stem

    def left_of(self, pair: Pair) -> str:
        """Which response is shown on the left, as A: "first" or "second"; the same whenever it is asked."""
        return CHOICES[int(rng(self.seed, 29, int(pair.id, 16)).integers(2))]

    def labels(self) -> list[str | None]:
        """For each pair "first", "second", "tie", or None where it is skipped or not labelled yet."""
        active = read_labels(self.path).active
        choices = [active.get(p.id, {}).get("choice") for p in self.pairs]
        return [None if c == "skip" else c for c in choices]

    def next(self) -> Pair | None:
        """The first pair that is neither labelled nor skipped; None when all are done."""
        active = read_labels(self.path).active
        return next((p for p in self.pairs if p.id not in active), None)

    def done(self) -> int:
        """How many pairs are labelled or skipped."""
        active = read_labels(self.path).active
        return sum(p.id in active for p in self.pairs)

    def record(self, pair: Pair, choice: str, *, seconds: float | None = None) -> None:
        """Put one label on disk; when this returns, it has survived whatever happens to the program."""
        if not isinstance(choice, str) or choice not in CHOICES:
            raise UserError(f"{choice!r} is no choice: use one of {', '.join(CHOICES)}")
        row = {"action": "label", "pair": pair.id, "choice": choice, "left": self.left_of(pair)}
        if seconds is not None:
            row["seconds"] = round(seconds, 2)
        self._append(row)

    def undo(self) -> Pair | None:
        """Take back the label given last, by a line that says so; None if there is none of these pairs."""
        known = {p.id: p for p in self.pairs}
        last = next((i for i in reversed(read_labels(self.path).active) if i in known), None)
        if last is None:
            return None
        self._append({"action": "undo", "pair": last})
        return known[last]

    def report(self) -> str:
        """What a person should know about the file: damaged lines, labels of other pairs. Empty if nothing."""
        contents = read_labels(self.path)
        lines = [
            f"{self.path.name}, line {n} does not count: {what}; it stays in the file, and if it was a label, its pair "
            "is shown again."
            for n, what in contents.damaged
        ]
        known = {p.id for p in self.pairs}
        if others := sum(i not in known for i in contents.active):
            lines.append(
                f"{self.path.name} holds {others} label{'s' * (others > 1)} of pairs that are not in this list; "
                "they stay in the file and are not used here."
            )
        return "\n".join(lines)

    def _append(self, row: dict) -> None:
        row["at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        advice = "this label was not kept, earlier ones are untouched: free some space or choose another file"
        with explained(f"writing {self.path}", advice):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with open(self.path, "ab", buffering=0) as file:
                line = json.dumps(row).encode() + b"\n"  # ASCII: no half of a character can be left behind
                if _ends_inside_a_line(self.path):
                    line = b"\n" + line  # a broken last line must not take this one with it
                while line:  # a nearly full disk takes a part
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            if is_new:
                _sync_folder(self.path.parent)


def _ends_inside_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _sync_folder(folder: Path) -> None:
    """Make a new file's name as safe as its content, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def simulated_labels(pairs: Sequence[Pair], labeler) -> list[str]:
    """What a simulated labeler (`rewards.Labeler`) says to each pair: "first" or "second"; it knows no ties."""
    rewards, lengths = (
        numbers(f"{k} of pairs", [getattr(p, k) for p in pairs]) for k in ("rewards", "lengths")
    )
    first = labeler.prefers_first(rewards[:, 0], rewards[:, 1], lengths[:, 0], lengths[:, 1])
    return [CHOICES[0] if f else CHOICES[1] for f in first]


def comparisons_of(pairs: Sequence[Pair], labels: Sequence[str | None]) -> datasets.Dataset:
    """Comparisons {"prompt", "chosen", "rejected"}; ties and pairs without a label are dropped (InstructGPT)."""
    if len(pairs) != len(labels):
        raise UserError(
            f"{len(labels)} labels do not go with {len(pairs)} pairs: give one each, None for no label"
        )
    rows = []
    for pair, label in zip(pairs, labels, strict=True):
        if label in CHOICES[:2]:
            chosen, rejected = (pair.first, pair.second) if label == "first" else (pair.second, pair.first)
            rows.append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected})
    if not rows:
        raise UserError(
            "no pair has a label for one side: label some first (ties teach a reward model nothing)"
        )
    return datasets.Dataset.from_list(rows)


class LabelPanel:
    """Buttons, keys and progress for a `LabelFile`, from ipywidgets alone; the last expression of a cell shows it.

    settle: seconds in which a new pair cannot be labelled yet, so that a double click labels one pair, not two.
    """

    def __init__(
        self,
        file: LabelFile,
        question: str,
        *,
        settle: float = 0.4,
        clock: Callable[[], float] = time.monotonic,
    ):
        import ipywidgets as widgets

        self.file, self.settle, self.clock = file, settle, clock
        self.question = widgets.HTML(f"<b>{html.escape(question)}</b>")
        self.progress = widgets.IntProgress(min=0, max=len(file.pairs), layout={"width": "200px"})
        self.count, self.prompt, self.message = widgets.HTML(), widgets.HTML(), widgets.HTML()
        side = {"width": "50%", "margin": "2px 12px 10px 2px"}
        self.sides = {"A": widgets.HTML(layout=side), "B": widgets.HTML(layout=side)}
        self.buttons = {
            key: widgets.Button(description=f"{text} ({key})", layout={"width": "auto"})
            for key, text in KEYS.items()
        }
        for key, button in self.buttons.items():
            button.on_click(lambda _, key=key: self.press(key))
        self.keys = widgets.Text(
            placeholder="keys: click here, then a, b, t, s or u",
            layout={"width": "280px"},
            continuous_update=True,
        )
        self.keys.observe(self._typed, names="value")
        self.box = widgets.VBox(
            [
                self.question,
                widgets.HBox([self.progress, self.count]),
                self.prompt,
                widgets.HBox(list(self.sides.values())),
                widgets.HBox([*self.buttons.values()], layout={"flex_flow": "row wrap"}),
                self.keys,
                self.message,
            ]
        )
        self.pair: Pair | None = None
        self.show()

    def press(self, key: str) -> None:
        """What a button or a key does: a, b, t, s or u."""
        try:
            if key == "u":
                back = self.file.undo()
                self.show("Taken back: here it is again." if back else "There is nothing to take back.", back)
            elif self.pair is not None:
                waited = self.clock() - self.shown_at
                if waited < self.settle:
                    return self._say("That was quicker than one can read: look at this new pair first.")
                left = self.file.left_of(self.pair)
                right = CHOICES[1 - CHOICES.index(left)]
                choice = {"a": left, "b": right, "t": "tie", "s": "skip"}[key]
                self.file.record(self.pair, choice, seconds=waited)
                self.show()
        except UserError as error:  # nothing was kept: the same pair stays
            self._say(str(error), colour="#b00020")

    def show(self, message: str = "", pair: Pair | None = None) -> None:
        """Show the next pair (or `pair`), or that all are done."""
        self.pair = pair or self.file.next()
        done, of = self.file.done(), len(self.file.pairs)
        self.progress.value, self.count.value = done, f"{done} of {of} done"
        if self.pair is None:
            self.prompt.value = (
                "<b>All pairs are done. Thank you!</b> Run the cells below to use your labels."
            )
            for side in self.sides.values():
                side.value = ""
        else:
            texts = {"A": self.pair.first, "B": self.pair.second}
            if self.file.left_of(self.pair) == "second":
                texts = {"A": self.pair.second, "B": self.pair.first}
            self.prompt.value = f"Both begin: <i>{html.escape(self.pair.prompt)}</i> …"
            for name, text in texts.items():
                text = f"<b>{name}</b><br>… {html.escape(text.strip())}"
                self.sides[name].value = f"<div style='{CARD}'>{text}</div>"
        for key in "abts":
            self.buttons[key].disabled = self.pair is None
        self.buttons["u"].disabled = done == 0
        self._say("\n".join(filter(None, [message, self.file.report()])))
        self.shown_at = self.clock()

    def _say(self, text: str, colour: str = "inherit") -> None:
        self.message.value = f"<span style='color:{colour};white-space:pre-line'>{html.escape(text)}</span>"

    def _typed(self, change) -> None:
        typed = change["new"].strip().lower()
        if not change["new"]:
            return
        self.keys.value = ""
        if typed in KEYS:
            self.press(typed)
        elif typed:
            self._say("One key at a time: a, b, t, s or u.")

    def __repr__(self) -> str:
        return f"Labelling panel of {self.file.path.name}: {self.file.done()} of {len(self.file.pairs)} pairs done"

    def _repr_mimebundle_(self, **_) -> dict:
        """The buttons where somebody can press them; a saved notebook that nobody watched keeps the sentence only."""
        note = f"{self!r}. Run this cell to label: the buttons appear here."
        bundle = {"text/plain": note, "text/html": f"<i>{html.escape(note)}</i>"}
        if someone_is_there():
            view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
            bundle["application/vnd.jupyter.widget-view+json"] = view
        return bundle
