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
    except OSError as error:
        reason = "no space left on the disk" if error.errno == 28 else (error.strerror or first_line(error))
        raise UserError(f"{doing} failed ({reason}); {advice}") from error
    except Exception as error:  # safetensors, tokenizers and pandas each raise kinds of their own
        raise UserError(f"{doing} failed ({first_line(error)}); {advice}") from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")
