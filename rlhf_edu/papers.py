"""The tables printed in the three papers (data/papers/*.csv, described in data/README.md), one value a row."""

import pandas as pd

from .data import DATA
from .errors import UserError, explained
from .tables import read_csv

FOLDER = DATA / "papers"
ABOUT = ("unit", "paper", "source", "note")  # text columns of every table; `page` is a number or missing
TABLES = {  # name: number of rows, the columns that tell one row from another
    "simpo_main": (200, "setting method measure"),
    "simpo_ablation": (39, "setting method measure"),
    "simpo_v02": (36, "setting method measure"),
    "simpo_search": (53, "method parameter value"),
    "simpo_chosen": (34, "method setting parameter"),
    "simpo_statistics": (43, "setting method measure"),
    "dpo_human_study": (20, "method measure"),
    "dpo_win_rates": (11, "task method temperature read_from"),
    "instructgpt": (35, "topic quantity"),
}
NUMBERS = ("value", "temperature", "n", "plus_minus")  # n and plus_minus are missing where not stated


def table(name: str) -> pd.DataFrame:
    """One of `TABLES`: `value` with its `unit`, its paper, table or figure, and page where known.

    What is not known is missing (numbers) or "" (text). Rows stand in the paper's order, which a wide table keeps by
    `.pivot(index="method", columns=..., values="value").reindex(rows.method.unique())`.
    """
    if name not in TABLES:
        raise UserError(f"no table of the papers is called {name!r}: choose from {', '.join(TABLES)}")
    path = FOLDER / f"{name}.csv"
    advice = f"restore it, e.g. with `git checkout data/papers/{path.name}`"
    if not path.exists():
        raise UserError(f"{path} is missing: {advice}")
    rows, keys = TABLES[name][0], TABLES[name][1].split()
    found = read_csv(path, ["value"], advice)
    with explained(f"reading {path}", advice):
        if missing := [c for c in (*keys, *ABOUT, "page") if c not in found]:
            raise ValueError(f"it lacks the column {missing[0]!r}")
        if len(found) != rows:
            raise ValueError(f"it has {len(found)} rows, not {rows}")
        for column in found:
            if column in NUMBERS:
                found[column] = pd.to_numeric(found[column]).astype(float)
            elif column == "page":
                found[column] = pd.to_numeric(found[column]).astype("Int64")
            else:
                found[column] = found[column].astype(object).where(found[column].notna(), "").astype(str)
        if found.duplicated(keys).any():
            raise ValueError(f"row {found.duplicated(keys).to_numpy().argmax() + 1} is there twice")
    return found
