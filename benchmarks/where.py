#!/usr/bin/env python3
"""Where the time of our trainers goes, by kind of operation (torch.profiler): data/results/benchmarks/where.csv.

python benchmarks/where.py          about 2 minutes on 2 quiet cores
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pandas as pd
import work
from torch.profiler import ProfilerActivity, profile

from rlhf_edu.training import replacing

KINDS = {  # the first whose part of a name matches
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "activation": ("gelu",),
    "layer norm": ("layer_norm",),
    "softmax, sums of probabilities": ("softmax", "cumsum", "searchsorted"),
    "optimizer, clipping": ("adamw", "norm", "aten::mul_"),
    "copies, indexing, zeroing": (
        "copy",
        "cat",
        "index",
        "fill",
        "zero",
        "scatter",
        "gather",
        "select",
        "embedding",
    ),
}
WORKS = {"SFT": "sft", "DPO": "dpo", "SimPO": "simpo", "PPO": "ppo", "generation": "generation"}


class Measured(Exception):
    """Enough turns were seen."""


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "everything else")


def profiled(name: str, size: work.Size, turns: int) -> pd.Series:
    """Share of the time of `turns` turns of one of our works, by kind of operation."""
    profiler, steps = profile(activities=[ProfilerActivity.CPU]), 0

    def gate(units=None, kind="step"):
        nonlocal steps
        steps += bool(units) and kind == "step"
        if steps == 1 and units:  # the first turn warms up
            profiler.start()
        elif steps == 1 + turns:
            profiler.stop()
            raise Measured

    try:
        work.ours(name, size, gate)
    except Measured:
        pass
    seconds = pd.Series(
        {event.key: event.self_cpu_time_total for event in profiler.key_averages()}, dtype=float
    )
    return (seconds / seconds.sum()).groupby(kind_of).sum()


def main():
    table = pd.DataFrame({name: profiled(given, work.Size(), 3) for name, given in WORKS.items()}).fillna(0.0)
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index].round(4)
    path = ROOT / "data" / "results" / "benchmarks" / "where.csv"
    with replacing(path) as temporary:
        table.to_csv(temporary, index_label="kind of operation")
    print((100 * table).round(1).to_string())
    print(f"percent of the time of our trainers; {dataclasses.asdict(work.Size())}")


if __name__ == "__main__":
    main()
