"""One kind of error for everything a user can cause: one sentence that says what, where and what to do."""

import contextlib

import numpy as np


class UserError(Exception):
    """Shown to the user as its message alone, without a traceback, by `python -m rlhf_edu`."""


def numbers(what: str, values) -> np.ndarray:
    """`values` as an array of finite floats, or one sentence that names `what` they are and the first bad one."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} must be numbers in rows of one length ({first_line(error)})") from error
    if not np.isfinite(array).all():
        place = np.unravel_index(np.argmin(np.isfinite(array)), array.shape)
        at = f", entry {', '.join(map(str, place))}," if place else ""
        raise UserError(f"{what}{at} must be finite, but it is {array[place]}: repair it or leave it out")
    return array


FREE_SPACE = "earlier results are untouched, free some space and start again"
FULL = ("(os error 28)", "No space left on device")  # how releases of safetensors say it


@contextlib.contextmanager
def explained(doing: str, advice: str):
    """Turn whatever a library raises while `doing` something into one `UserError` that ends in `advice`."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # safetensors, tokenizers and pandas each raise kinds of their own
        reason = getattr(error, "strerror", None) or first_line(error)
        if getattr(error, "errno", None) == 28 or any(said in str(error) for said in FULL):
            reason = "no space left on the disk"
        raise UserError(f"{doing} failed ({reason}); {advice}") from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")


def described(error: BaseException) -> str:
    """Kind and text of what a student's code raised, whose own `__str__` may be broken too."""
    try:
        text = str(error)[:200]
    except BaseException:  # noqa: BLE001
        text = "its text cannot be read"
    return f"{type(error).__name__}: {text}"
