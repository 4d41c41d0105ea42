"""A judge behind any OpenAI-compatible endpoint, through the official client (`pip install -e .[judge]`).

Nothing is sent before an estimate of what it costs is below `max_cost`; every answer is kept on disk, so that an
interrupted run goes on where it stopped and a repeated one costs nothing.
"""

import dataclasses
import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from .data import write_jsonl
from .errors import UserError, explained, first_line
from .judges import TEMPLATES, _check

CHARACTERS_A_TOKEN = 4  # of English, roughly: for the estimate only


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run will ask for at most: answers kept on disk are not asked for again, unreadable ones are."""

    questions: int
    cached: int
    input_tokens: int
    output_tokens: int
    cost: float  # in the currency of the price
    example: str  # the first question in full

    def __str__(self) -> str:
        return (
            f"{self.questions} questions, {self.cached} of them answered on disk; at most about {self.input_tokens} "
            f"tokens in and {self.output_tokens} out; at most about {self.cost:.2f}"
        )


@dataclasses.dataclass
class EndpointJudge:
    """`EndpointJudge(model, price=(in, out), cache=file)(prompts, first, second)`; texts in, see `judges`.

    price: of a million tokens in and out; (0, 0) for a server of your own. A run that is estimated to cost more than
    `max_cost` is refused. `dry_run=True` prints the estimate and the first question, sends nothing and gives ties.
    The key is read from the environment variable `key_variable` and written nowhere. The client tries again after
    429, time-outs and errors of the server, waiting longer each time, `retries` times.
    `unreadable` counts the questions whose answers named no winner after `attempts` tries: they count as ties.
    """

    model: str
    price: tuple[float, float]
    cache: str | Path
    base_url: str | None = None  # None: the client's own default
    key_variable: str = "OPENAI_API_KEY"
    template: str = TEMPLATES["concise"]
    max_cost: float = 1.0
    dry_run: bool = False
    temperature: float = 0.0
    max_tokens: int = 200
    timeout: float = 60.0
    retries: int = 5
    attempts: int = 3
    workers: int = 4
    unreadable: int = dataclasses.field(default=0, init=False)

    def __call__(self, prompts, first, second) -> np.ndarray:
        questions = self.questions(prompts, first, second)
        estimate = self.estimate(prompts, first, second)
        if self.dry_run:
            print(f"{estimate}\nThe first question:\n{estimate.example}")
            return np.full(len(questions), 0.5)
        if estimate.cost > self.max_cost:
            raise UserError(f"{estimate}, more than max_cost={self.max_cost:g}: ask less, or raise max_cost")
        kept = read_cache(self.cache)
        missing = dict.fromkeys(q for q in questions if self._key(q) not in kept)
        if missing:
            print(estimate)
            kept |= self._ask_all(list(missing))
        found = [parse_answer(kept.get(self._key(q), "")) for q in questions]
        self.unreadable = sum(answer is None for answer in found)
        return np.array([0.5 if answer is None else answer for answer in found])

    def questions(self, prompts, first, second) -> list[str]:
        _check(prompts, first, second)
        columns = zip(prompts, first, second, strict=True)
        return [self.template.format(prompt=p, first=a, second=b) for p, a, b in columns]

    def estimate(self, prompts, first, second) -> Estimate:
        """Counts and an upper estimate of the cost; sends nothing and needs no key."""
        questions = list(dict.fromkeys(self.questions(prompts, first, second)))
        kept = read_cache(self.cache)
        missing = [q for q in questions if self._key(q) not in kept]
        # an answer that names no winner is asked for again
        tokens_in = self.attempts * sum(len(q) // CHARACTERS_A_TOKEN + 8 for q in missing)
        tokens_out = self.attempts * len(missing) * self.max_tokens
        cost = (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6
        return Estimate(
            len(questions), len(questions) - len(missing), tokens_in, tokens_out, cost, (questions or [""])[0]
        )

    def _key(self, question: str) -> str:
        settings = [self.base_url, self.model, self.temperature, self.max_tokens, question]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def _ask_all(self, questions: list[str]) -> dict[str, str]:
        """Readable answers by key, each on disk as soon as it is there."""
        client, stop, kept, failure = self._client(), threading.Event(), {}, None
        with ThreadPoolExecutor(self.workers) as pool:
            jobs = {pool.submit(self._ask, client, q, stop): q for q in questions}
            for job in as_completed(jobs):
                if job.exception():
                    failure = failure or job.exception()
                elif job.result() is not None:
                    key = self._key(jobs[job])
                    kept[key] = job.result()
                    append_to_cache(self.cache, {"key": key, "model": self.model, "answer": job.result()})
        if failure:
            raise UserError(
                f"judge {self.model!r}: {_reason(failure, self.key_variable)}; {len(kept)} new answers are kept in "
                f"{self.cache}, run it again to go on"
            ) from failure
        return kept

    def _ask(self, client, question: str, stop: threading.Event) -> str | None:
        """An answer that names a winner, or None after `attempts` that do not."""
        for _ in range(self.attempts):
            if stop.is_set():
                return None
            try:
                reply = client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question}],
                    temperature=self.temperature,
                    max_tokens=self.max_tokens,
                )
                text = reply.choices[0].message.content
            except (
                ValueError,
                TypeError,
                AttributeError,
                IndexError,
            ):  # status 200, but no completion inside
                continue
            except BaseException:
                stop.set()  # the others need not run into the same
                raise
            if isinstance(text, str) and parse_answer(text) is not None:
                return text
        return None

    def _client(self):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("the client is missing: install it with `pip install -e .[judge]`") from error
        key = os.environ.get(self.key_variable)
        if not key:
            raise UserError(
                f"{self.key_variable} is not set: put the key of {self.base_url or 'the endpoint'} into it (any word "
                "for a server without keys)"
            )
        return openai.OpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.retries
        )


def parse_answer(text: str) -> float | None:
    """1 if the last line of an answer names A, 0 if it names B, None if neither: never a guess."""
    lines = [line for line in str(text).splitlines() if line.strip()]
    if not lines:
        return None
    match = re.fullmatch(
        r"(?:(?:the )?(?:preferred|better|answer|winner|best)(?: one)?(?: is)?\s*:?\s*)?"
        r"(?:summary |answer |text )?[\"'(\[]*([ab])[\"')\]]*\.?",
        lines[-1].replace("*", "").strip(),
        re.IGNORECASE,
    )
    return None if match is None else float(match.group(1).upper() == "A")


def read_cache(path: str | Path) -> dict[str, str]:
    """{key: answer}; a last line that an interruption cut short is dropped, from the file too."""
    path = Path(path)
    if not path.exists():
        return {}
    with explained(f"reading the judge's answers {path}", "delete it to ask again, or name another cache"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        whole = bool(lines) and lines[-1].endswith("\n")
        rows = [json.loads(line) for line in (lines if whole else lines[:-1])]
        answers = {row["key"]: row["answer"] for row in rows}
    if lines and not whole:
        write_jsonl(path, rows)
    return answers


def append_to_cache(path: str | Path, row: dict) -> None:
    """One line in one write, so that an interruption leaves whole lines and at most one cut short."""
    with explained(f"writing the judge's answer to {path}", "free some space or name another cache"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _reason(error: Exception, key_variable: str) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return f"the key in {key_variable} was refused ({status})"
    told = {
        404: "no such model or address (404)",
        429: "too many requests or no credit (429), after all retries",
    }
    if status in told:
        return told[status]
    if status:
        return f"the server answered {status} ({first_line(error)})"
    return (
        "no answer in time" if "Timeout" in type(error).__name__ else f"no usable reply ({first_line(error)})"
    )
