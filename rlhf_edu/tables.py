"""The CSV and JSON files of a run: written whole or not at all, and looked at when they are read."""

import json
from pathlib import Path

import pandas as pd

from .errors import FREE_SPACE, UserError, explained
from .training import replacing

TEXT = {"run", "method", "knob", "prompt", "response", "stage"}  # all other columns are numbers
COLUMNS = {
    "frontier": "seed run method knob step reward reward_se kl kl_se length ended prompts",
    "best_of_n": "seed n reward reward_se kl",
    "margins": "seed method length_difference margin",
    "lengths": "seed method length logp_per_token",
    "correlations": "seed method rho",
    "samples": "run prompt response reward",
    "seconds": "stage seconds",
}
AGAIN = "delete it and run the same command again"


def read_csv(path: Path, columns, advice: str = AGAIN) -> pd.DataFrame:
    """The table at `path`, checked: these columns are there, numbers are numbers, no line was cut short."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing; run the same command again, which makes what is missing")
    with explained(f"reading {path}", advice):
        header = pd.read_csv(path, nrows=0).columns
        blank = {c: ["", "nan", "NaN"] for c in header if c not in TEXT}  # but a response may be "NA"
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=blank)
        if table.empty:
            raise ValueError("it has no lines")
        for column in columns:
            if column not in table:
                raise ValueError(f"it lacks the column {column!r}")
            if column not in TEXT:
                table[column] = pd.to_numeric(table[column])
            if table[column].isna().any() and not column.endswith("_se") and column != "rho":
                raise ValueError(f"row {table[column].isna().to_numpy().argmax() + 1} has no {column!r}")
        if not Path(path).read_bytes().endswith(b"\n"):
            raise ValueError("its last line was cut short")
    return table


def write_csv(table: pd.DataFrame, path: Path) -> None:
    with explained(f"writing {path}", FREE_SPACE), replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def read_json(path: Path, keys, advice: str = AGAIN) -> dict:
    """The object at `path`, which holds at least `keys`."""
    with explained(f"reading {path}", advice):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict) or (missing := [k for k in keys if k not in value]):
            raise ValueError(
                f"it lacks {missing[0]!r}" if isinstance(value, dict) else "it is no JSON object"
            )
    return value


def write_json(value, path: Path) -> None:
    with explained(f"writing {path}", FREE_SPACE), replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
