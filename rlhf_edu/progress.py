"""Progress with time left: one line that rewrites itself in a terminal, a line now and then in a log."""

import sys
import time


class Progress:
    """Counts work done against work planned, in units that only need to be proportional to time.

    `plan` maps the name of each piece of work to its expected cost. A piece found finished on disk is
    struck off with `skip`, so that the time left speaks of what is left.
    """

    def __init__(self, plan: dict[str, float], *, stream=None, every: float = 15.0):
        self.plan = dict(plan)
        self.stream = stream or sys.stderr
        self.every = every
        self.started = time.monotonic()
        self.done_units = 0.0  # of work really done in this process: the measure of our pace
        self.name, self.fraction, self.printed = "", 0.0, 0.0

    def skip(self, name: str) -> None:
        self.plan.pop(name, None)

    def start(self, name: str) -> None:
        self.name, self.fraction = name, 0.0
        self.plan.setdefault(name, 0.0)
        self._show(force=False)

    def update(self, fraction: float, note: str = "") -> None:
        self.fraction = min(max(fraction, 0.0), 1.0)
        self._show(note, force=False)

    def finish(self, note: str = "") -> None:
        self.done_units += self.plan.pop(self.name, 0.0)
        self.fraction = 0.0
        self._show(note, force=True)

    def seconds_left(self) -> float | None:
        """None until enough was done to tell."""
        current = self.plan.get(self.name, 0.0) * self.fraction
        done, elapsed = self.done_units + current, time.monotonic() - self.started
        if done <= 0 or elapsed < 2:
            return None
        return elapsed / done * (sum(self.plan.values()) - current)

    def _show(self, note: str = "", *, force: bool) -> None:
        now, terminal = time.monotonic(), self.stream.isatty()
        if not force and now - self.printed < (0.3 if terminal else self.every):
            return
        self.printed = now
        left = self.seconds_left()
        text = (
            f"{clock(now - self.started)}  {self.name:<30.30} {'done' if force else f'{self.fraction:4.0%}'}"
        )
        text += f"  {note}" if note else ""
        text += f"  (about {clock(left)} left)" if left is not None else ""
        if terminal:
            self.stream.write(f"\r\x1b[2K{text}" + ("\n" if force else ""))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
