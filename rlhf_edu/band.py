"""The finished runs of several seeds in one folder: the band behind the figures of a run of one seed."""

from pathlib import Path

import pandas as pd

from .errors import UserError
from .figures import bin_margins
from .tables import COLUMNS, read_csv, read_json, write_csv, write_json


def configurations(folders: list[Path]) -> list[dict]:
    """The configuration of each run folder; a clear word if they are not of one scale."""
    configs = [read_json(folder / "config.json", ("scale", "seed")) for folder in folders]
    if any(config["scale"] != configs[0]["scale"] for config in configs):
        raise UserError(
            "these runs have different settings and cannot form one table: run them with the same scale"
        )
    return configs


def together(folders: list[Path], configs: list[dict], name: str) -> pd.DataFrame:
    """The table `name` of all folders, each row with its seed."""
    tables = [read_csv(folder / f"{name}.csv", COLUMNS[name].split()) for folder in folders]
    return pd.concat([t.assign(seed=c["seed"]) for t, c in zip(tables, configs, strict=True)])


def gather_band(folders: list[Path], output: Path) -> None:
    """The results of several finished main jobs, one CSV each."""
    for folder in folders:
        if not (folder / "report.html").exists():
            raise UserError(
                f"{folder} holds no finished run: finish it with `python -m rlhf_edu reproduce` first"
            )
    configs = configurations(folders)
    for name in ("frontier", "best_of_n", "correlations", "seconds"):
        write_csv(together(folders, configs, name), output / f"{name}.csv")
    write_csv(bin_margins(together(folders, configs, "margins")), output / "margins_binned.csv")
    write_json(configs, output / "runs.json")
