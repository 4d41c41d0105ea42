"""One kind of error for everything a user can cause: one sentence that says what, where and what to do."""

import contextlib


class UserError(Exception):
    """Shown to the user as its message alone, without a traceback, by `python -m rlhf_edu`."""


@contextlib.contextmanager
def explained(doing: str, advice: str):
    """Turn whatever a library raises while `doing` something into one `UserError` that ends in `advice`."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # safetensors, tokenizers and pandas each raise kinds of their own
        reason = getattr(error, "strerror", None) or first_line(error)
        if getattr(error, "errno", None) == 28 or "(os error 28)" in str(error):  # the second is safetensors
            reason = "no space left on the disk"
        raise UserError(f"{doing} failed ({reason}); {advice}") from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")
