#!/usr/bin/env python3
"""Our trainers beside TRL's, on the same model, pairs, batch and threads; speed, memory, share of the machine's limit.

    python benchmarks/run.py            about 15 minutes on 2 quiet cores; results in data/results/benchmarks/
    python benchmarks/run.py --quick    the main works, a few turns each, about 2 minutes; results in outputs/

Every trainer runs in a process of its own (work.py). The processes of one comparison take turns, a training step
each and never two at a time, and a matrix product is timed in every round, so that whatever else the machine does
meets all of them alike. Rates are medians over the turns. Stopped, the same command goes on with the works that
are missing. Each starts from GPT-2 as it is: ours computes its activation in one kernel (`models.fused_gelu`), TRL as
transformers does; how fast TRL is with our activation is measured as well. TRL's PPO is that of 1.12.0, the last with
one; pip puts it into outputs/ without its dependencies.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pandas as pd
import torch
from matplotlib.ticker import LogLocator
from work import STOPS, Size

from rlhf_edu import figures
from rlhf_edu.training import replacing

OLD_TRL = "1.12.0"
PRECOMPUTED, FUSED = "TRL, reference precomputed", "TRL, our activation"
# work: what is counted, participants (name: program and the work it is given), turns measured (--quick: a quarter)
WORKS = {
    "SFT": ("sequences", {"ours": "ours sft", "TRL": "trl sft", FUSED: "trl-fused sft"}, 12),
    "DPO": (
        "pairs",
        {"ours": "ours dpo", "TRL": "trl dpo", PRECOMPUTED: "trl dpo precomputed"}
        | {f"{PRECOMPUTED}, our activation": "trl-fused dpo precomputed"},
        12,
    ),
    "SimPO": ("pairs", {"ours": "ours simpo", "TRL": "trl simpo", FUSED: "trl-fused simpo"}, 12),
    "PPO": ("episodes", {"ours": "ours ppo", "TRL": "trl ppo", FUSED: "trl-fused ppo"}, 5),
    "generation": (
        "tokens",
        {"ours": "ours generation", "TRL": "trl generation", FUSED: "trl-fused generation"},
        8,
    ),
    "generation, none ends": (
        "tokens",
        {"ours": "ours generation to the end", "TRL": "trl generation to the end"},
        8,
    ),
    "ORPO": ("pairs", {"ours": "ours orpo", "TRL": "trl orpo"}, 8),
    "reward model": ("pairs", {"ours": "ours reward model", "TRL": "trl reward model"}, 8),
}
QUICK = ("SFT", "DPO", "SimPO", "PPO", "generation")
GROWTH = {  # DPO again with one thing changed: its values, and the fields of `Size` that hold it
    "pairs": (8, 16, 64),
    "longest": (16, 80),
    "width": (128, 512),
}


# --- measuring ---


class Participant:
    def __init__(self, program: str, size: Size, log, path: str = ""):
        name, work = program.split(" ", 1)
        script = [sys.executable, str(ROOT / "benchmarks" / "work.py"), name]
        given = json.dumps({"work": work, **dataclasses.asdict(size)})
        env = {**os.environ, "OMP_NUM_THREADS": str(size.threads), "PYTHONPATH": path}
        self.program, self.log = program, log
        self.process = subprocess.Popen(
            [*script, given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, text=True
        )

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.program} stopped: its last words are in {self.log.name}")
        return json.loads(line)

    def turn(self) -> dict:
        """One turn of work; {"kind", "seconds", "units", "memory"}."""
        while True:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            if (answer := self.answer())["units"]:
                return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def matmul_rate(threads: int, side: int = 1024) -> dict:
    """float32 products of square matrices: the rate nothing can exceed, as one more turn (units: operations)."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0))
    a @ b
    began = time.perf_counter()
    for _ in range(8):
        a @ b
    return {"kind": "step", "seconds": time.perf_counter() - began, "units": 8 * 2 * side**3}


def measure(participants: dict[str, str], size: Size, turns: int, log, path: str = "", warm: int = 1):
    """One row for each measured turn: participant, kind ("step", "reference"), seconds, units, memory (MB)."""
    running, rows = {}, []
    try:
        for name, program in participants.items():
            running[name] = Participant(program, size, log, path)
        for process in running.values():
            process.answer()  # it is ready
        steps = dict.fromkeys(running, 0)
        while min(steps.values()) < turns + warm:
            for name, process in running.items():
                answer = process.turn()
                steps[name] += answer["kind"] == "step"
                if answer["kind"] != "step" or steps[name] > warm:
                    rows.append({"participant": name, **answer})
            rows.append({"participant": "matmul", **matmul_rate(size.threads)})
    finally:
        for process in running.values():
            process.close()
    return rows


# --- what is needed at least ---


def forward_flops(size: Size, prompt: float, response: float, vocabulary: bool = True) -> float:
    """Operations of the matrix products of one sequence: all tokens through the body, responses to the vocabulary.

    24 width^2 a token and layer for the linear maps, 4 width a pair of tokens that attend to each other.
    """
    time = prompt + response
    body = size.layers * (24 * size.width**2 * time + 4 * size.width * time * (time + 1) / 2)
    return body + vocabulary * 2 * size.width * size.vocabulary * response


def flops_a_unit(work: str, size: Size) -> float:
    """Matrix-product operations that one sequence, pair, episode or generated token needs; backward costs twice."""
    lengths = range(size.shortest, size.longest + 1)
    sequence, scored = (
        sum(forward_flops(size, size.prompt, n, head) for n in lengths) / len(lengths)
        for head in (True, False)
    )
    sampled = size.longest if work.endswith("none ends") else (1 - (1 - STOPS) ** size.longest) / STOPS
    episode = forward_flops(size, size.prompt, sampled)
    if work == "SFT":
        return 3 * sequence
    if work == "reward model":
        return 6 * scored
    if work.startswith("generation"):
        return episode / sampled
    if work == "PPO":  # sampling, log-probs of policy and reference, the reward, and two epochs of updates
        return episode * (3 + 2 * 3) + forward_flops(size, size.prompt, sampled, False)
    return 6 * sequence


# --- tables ---


def summary(turns: pd.DataFrame) -> pd.DataFrame:
    """One row a comparison: rates (medians), their ratio with its range over the rounds, shares of the limit, memory."""
    rows = []
    for (work, given), part in turns.groupby(["work", "size"], sort=False):
        size, unit = Size(**json.loads(given)), WORKS[work][0]
        limit = rate(part, "matmul").median() / flops_a_unit(work, size)
        comparisons = [(work, "ours", "TRL", 0)]
        if (
            work == "DPO"
        ):  # (what ours is, what theirs is, whether the reference pass of one epoch is included)
            comparisons = [
                ("DPO, as each ships it, one epoch", "ours", "TRL", 1),
                ("DPO, reference precomputed in both, one epoch", "ours", PRECOMPUTED, 1),
                ("DPO, steps alone", "ours", PRECOMPUTED, 0),
            ]
        for label, first, second, with_pass in comparisons:
            if not (part.participant == second).any():
                continue
            mine, theirs = rate(part, first, with_pass), rate(part, second, with_pass)
            n = min(len(mine), len(theirs))
            rounds = mine[:n].to_numpy() / theirs[:n].to_numpy()
            fused = f"{second}, our activation"
            with_ours = (
                rate(part, fused, with_pass).median() if (part.participant == fused).any() else float("nan")
            )
            needed = 1 + with_pass / 3  # the reference pass is a third of a step: no backward
            rows.append(
                {
                    "work": label, "unit": unit, "pairs": size.pairs, "longest": size.longest, "width": size.width,
                    "ours_a_second": mine.median(), "trl_a_second": theirs.median(),
                    "trl_our_activation_a_second": with_ours, "ratio_our_activation": mine.median() / with_ours,
                    "ratio": mine.median() / theirs.median(), "ratio_low": rounds.min(), "ratio_high": rounds.max(),
                    "gflop_a_unit": flops_a_unit(work, size) * needed / 1e9,
                    "matmul_gflops": rate(part, "matmul").median() / 1e9, "limit_a_second": limit / needed,
                    "share_of_limit": mine.median() * needed / limit,
                    "trl_share_of_limit": theirs.median() * needed / limit,
                    "ours_mb": part[part.participant == first].memory.max(),
                    "trl_mb": part[part.participant == second].memory.max(), "turns": n,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def rate(part: pd.DataFrame, participant: str, with_pass: bool = False) -> pd.Series:
    """Units a second of each step; with_pass: as if the pass over the reference, done once, were spread over one epoch."""
    mine = part[part.participant == participant]
    steps = mine[mine.kind == "step"]
    seconds = steps.seconds / steps.units
    passes = mine[mine.kind == "reference"]
    if with_pass and len(passes):
        seconds = seconds + (passes.seconds / passes.units).median()
    return 1 / seconds


def table_text(table: pd.DataFrame) -> str:
    """The table as markdown."""
    names = ["work", "unit", "ours /s", "TRL /s", "ours over TRL", "TRL given our activation"]
    names += ["share of the limit, ours (TRL)", "peak MB, ours (TRL)"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in table.itertuples():
        fused = "" if math.isnan(row.ratio_our_activation) else f"{row.ratio_our_activation:.2f}"
        lines.append(
            f"| {row.work} | {row.unit} | {row.ours_a_second:.3g} | {row.trl_a_second:.3g} "
            f"| {row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}) "
            f"| {fused} | {row.share_of_limit:.0%} ({row.trl_share_of_limit:.0%}) | {row.ours_mb:.0f} ({row.trl_mb:.0f}) |"
        )
    return "\n".join(lines)


def growth_of(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of DPO's steps, one set of sizes for each thing that was changed: `changed`, `value`, seconds a step."""
    steps = table[table.work == "DPO, steps alone"]
    base = dataclasses.asdict(Size())
    parts = []
    for name in GROWTH:
        others = [n for n in GROWTH if n != name]
        part = steps[(steps[others] == pd.Series({n: base[n] for n in others})).all(axis=1)].sort_values(name)
        parts.append(part.assign(changed=name, value=part[name]))
    grown = pd.concat(parts)
    for who in ("ours", "trl"):
        grown[f"{who}_seconds"] = grown.pairs / grown[f"{who}_a_second"]
    return grown


def figure_of(table: pd.DataFrame) -> figures.Figure:
    grown = growth_of(table)
    base = dataclasses.asdict(Size())
    main = table[(table[list(GROWTH)] == pd.Series({n: base[n] for n in GROWTH})).all(axis=1)]
    main = main[main.work != "DPO, steps alone"].iloc[::-1]
    figure = figures.Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplot_mosaic(
        [["bars", *GROWTH], ["bars", *(f"{n} MB" for n in GROWTH)]], width_ratios=(1.7, 1, 1, 1)
    )
    bars = axes["bars"]
    names = [textwrap.fill(work, 22) for work in main.work]
    bars.barh(names, main.ratio, color="#0072B2", height=0.6)
    errors = [main.ratio - main.ratio_low, main.ratio_high - main.ratio]
    bars.errorbar(main.ratio, names, xerr=errors, fmt="none", ecolor="black", capsize=2)
    for place, row in enumerate(main.itertuples()):
        bars.text(0.05, place, f"{row.ratio:.1f} ×", va="center", color="white", fontweight="bold")
    bars.axvline(1, color="black", linestyle=":")
    bars.set_xlabel("speed, ours over TRL\n(bar: ratio of medians; line: its range)")
    titles = {"pairs": "pairs a batch", "longest": "longest completion", "width": "model width"}
    for name in GROWTH if len(grown) else ():
        part = grown[grown.changed == name]
        for axis, kind in ((axes[name], "seconds"), (axes[f"{name} MB"], "mb")):
            axis.plot(part.value, part[f"ours_{kind}"], "o-", color="#0072B2", label="ours")
            axis.plot(part.value, part[f"trl_{kind}"], "s--", color="#D55E00", label="TRL")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(part.value, part.value)
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
        axes[name].set_title(titles[name], fontsize="medium")
    axes["pairs"].set_ylabel("seconds a DPO step")
    axes["pairs MB"].set_ylabel("peak MB")
    axes["width"].legend(loc="lower right")
    return figure


# --- the command ---


def old_trl(folder: Path, log) -> str:
    """Path of the last TRL with PPO; empty where it is not to be had."""
    place = folder / f"trl-{OLD_TRL}"
    if not (place / "trl").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(place),
            f"trl=={OLD_TRL}",
        ]
        if subprocess.run(command, check=False, stdout=log, stderr=log).returncode:
            print(f"TRL {OLD_TRL} could not be installed: no PPO in this run", flush=True)
            return ""
    return str(place)


def planned(quick: bool):
    """(work, size, participants, turns) of everything that is to be measured, in order."""
    for work, (_, participants, turns) in WORKS.items():
        if not quick or work in QUICK:
            yield work, Size(), participants, max(2, turns // 4) if quick else turns
    two = {name: WORKS["DPO"][1][name] for name in ("ours", PRECOMPUTED)}
    for field, values in () if quick else GROWTH.items():
        for value in values:
            yield "DPO", Size(**{field: value, "passed": 32}), two, 4


def identity(quick: bool) -> dict:
    """What one set of results has in common; a run that differs begins anew."""
    sources = sorted([*ROOT.glob("rlhf_edu/*.py"), *ROOT.glob("benchmarks/*.py")])
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    return {
        "quick": quick,
        "code": code,
        **versions,
        "trl_ppo": OLD_TRL,
        "python": platform.python_version(),
        **machine,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the main works, a few turns each")
    quick = parser.parse_args(arguments).quick
    folder = ROOT / "outputs" / ("benchmarks-quick" if quick else "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    began, rows, this = time.monotonic(), [], identity(quick)
    if (folder / "run.json").exists() and (folder / "turns.csv").exists():
        before = json.loads((folder / "run.json").read_text())
        if not before.pop("seconds", None) and before == this:  # without seconds: it was stopped
            rows = pd.read_csv(folder / "turns.csv").to_dict("records")
            print(
                f"going on: {len({(r['work'], r['size']) for r in rows})} works are there already", flush=True
            )
    (folder / "run.json").write_text(json.dumps(this, indent=2) + "\n")
    with open(folder / "log.txt", "a") as log:
        path = old_trl(ROOT / "outputs", log)
        for work, size, participants, turns in planned(quick):
            key = {"work": work, "size": json.dumps(dataclasses.asdict(size))}
            if any(row["work"] == work and row["size"] == key["size"] for row in rows):
                continue
            if work == "PPO" and not path:
                continue
            new = measure(participants, size, turns, log, path if work == "PPO" else "")
            rows += [{**key, **row} for row in new]
            with replacing(folder / "turns.csv") as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
            print(table_text(summary(pd.DataFrame(rows).tail(len(new)))).split("\n", 2)[2], flush=True)
    table = summary(pd.DataFrame(rows))
    table.round(4).to_csv(folder / "summary.csv", index=False)
    (folder / "speed.png").write_bytes(figures.png(figure_of(table)))
    (folder / "run.json").write_text(
        json.dumps({**this, "seconds": round(time.monotonic() - began)}, indent=2) + "\n"
    )
    print("\n" + table_text(table))
    limit = table.matmul_gflops
    print(
        f"\nmatmul: {limit.median():.0f} GFLOP/s ({limit.min():.0f} to {limit.max():.0f}); {time.monotonic() - began:.0f} s"
    )
    if not quick:
        results = ROOT / "data" / "results" / "benchmarks"
        results.mkdir(parents=True, exist_ok=True)
        for name in ("turns.csv", "summary.csv", "run.json", "speed.png"):
            shutil.copy(folder / name, results / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
