"""The command line: `python -m rlhf_edu reproduce`, `zoo`, `build`, `band`, `student`, `grade`, `stamp`, `bundle`; each with --help."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from .errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code. What a user can cause ends in one sentence, not in a traceback."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        quiet_libraries()
        options.command(options)
        return 0
    except UserError as error:
        clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # progress may have left a line half written
        print(f"{clear}rlhf_edu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nrlhf_edu: stopped; what was finished is kept, and the same command goes on from here",
            file=sys.stderr,
        )
        return 130


def _run_arguments(add: argparse.ArgumentParser, folder: str) -> None:
    add.add_argument("--scale", help="smoke, mini (default), gpt2 or paper; also RLHF_EDU_SCALE")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--output", type=Path, help=f"the run folder (default: {folder})")
    add.add_argument(
        "--micro-batch", type=int, metavar="N", help="at most N pairs, texts or episodes in memory at once"
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m rlhf_edu", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser(
        "reproduce", help="the main job: the IMDb frontier and the length plots, in outputs/"
    )
    _run_arguments(add, "outputs/SCALE-seedN")
    add.add_argument(
        "--imdb", help="take prompts from real reviews: an IMDb folder, or hub; also RLHF_EDU_IMDB"
    )
    add.add_argument("--methods", help="only these of the frontier, e.g. DPO,PPO,SimPO")
    add.set_defaults(command=reproduce)

    add = commands.add_parser(
        "zoo", help="eleven objectives on the same comparisons, tuned on one seed; a table in outputs/"
    )
    _run_arguments(add, "outputs/zoo-SCALE-seedN")
    add.add_argument(
        "--tuned", type=Path, metavar="FOLDER", help="take the chosen settings of this finished zoo"
    )
    add.add_argument("--threads", type=int, help="CPU threads (default: all)")
    add.set_defaults(command=zoo)

    add = commands.add_parser("build", help="train the shipped checkpoints again from IMDb")
    add.add_argument(
        "stages",
        nargs="*",
        default=[],
        help="tokenizer, base, sft, oracle, prompts, reward (default: all); or `tldr` [its stages], or `tldr-results`",
    )
    add.add_argument("--imdb", help="an IMDb folder, or hub; also RLHF_EDU_IMDB")
    add.add_argument("--output", type=Path, help="where the checkpoints go (default: data/models/mini)")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument(
        "--threads", type=int, help="CPU threads (default: all), e.g. 1 each for two stages at once"
    )
    add.set_defaults(command=build)

    add = commands.add_parser(
        "band", help="gather finished runs of several seeds, of reproduce or of zoo, into one folder"
    )
    add.add_argument("folders", nargs="+", type=Path)
    add.add_argument("--output", type=Path, required=True)
    add.set_defaults(command=band)

    add = commands.add_parser(
        "train", help="train on comparisons as a file of configs/ says; LoRA, larger models"
    )
    add.add_argument(
        "recipe", type=Path, metavar="FILE", help="e.g. configs/llama3_8b_ultrafeedback_simpo.json"
    )
    add.add_argument("--output", type=Path, help="the run folder (default: outputs/ and the file's name)")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--estimate", action="store_true", help="say what memory it would take, and stop")
    add.set_defaults(command=train)

    add = commands.add_parser("pin", help="pin the hub's models and data sets that have no revision yet")
    add.set_defaults(command=pin)

    add = commands.add_parser("student", help="the notebooks without solutions, and the autograder, in dist/")
    add.add_argument("--output", type=Path, default=Path("dist"))
    add.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="the notebooks with solutions")
    add.add_argument(
        "--variant-seed",
        metavar="SECRET",
        help="add a notebook of withheld exercises, drawn from this secret",
    )
    add.add_argument(
        "--variants", type=Path, metavar="FILE", help="your own withheld exercises, a Python file"
    )
    add.set_defaults(command=student)

    add = commands.add_parser("grade", help="grade SUBMISSIONS/<student>/<notebook>.ipynb")
    add.add_argument("submissions", type=Path)
    add.add_argument("--output", type=Path, default=Path("grades"))
    add.add_argument("--autograder", type=Path, default=Path("dist/autograder"), help="made by `student`")
    add.add_argument(
        "--cell-seconds", type=float, default=60.0, help="the most a cell may take (default: 60)"
    )
    add.add_argument(
        "--seconds", type=float, default=1800.0, help="the most a notebook may take (default: 1800)"
    )
    add.add_argument("--memory-gb", type=float, default=4.0, help="the most a notebook may use (default: 4)")
    add.add_argument("--jobs", type=int, default=1, help="notebooks at the same time (default: 1)")
    add.set_defaults(command=grade)

    add = commands.add_parser(
        "stamp", help="write the set-up cell, with pyproject.toml's repository, into all notebooks"
    )
    add.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    add.set_defaults(command=stamp)

    add = commands.add_parser(
        "bundle", help="dist/rlhf_edu.zip: package, data and notebooks, for Colab without a public repository"
    )
    add.add_argument("--output", type=Path, default=Path("dist"))
    add.add_argument(
        "--notebooks", type=Path, help="put these in, e.g. dist/student (default: the ones with solutions)"
    )
    add.set_defaults(command=bundle)
    return top


def reproduce(options) -> None:
    from . import experiments, scales

    scale = scales.chosen_scale(options.scale, options.micro_batch)
    folder = options.output or Path("outputs") / f"{scale.name}-seed{options.seed}"
    source = options.imdb or os.environ.get("RLHF_EDU_IMDB") or None
    only = options.methods.split(",") if options.methods else None
    command = ["python", "-m", "rlhf_edu", "reproduce", "--scale", scale.name, "--seed", str(options.seed)]
    command += ["--imdb", source] if source else []
    command += ["--methods", options.methods] if only else []
    command = shlex.join(command)
    path = experiments.reproduce(scale, options.seed, folder, imdb_source=source, only=only, command=command)
    experiments.say(f"Done. Open {path}")


def build(options) -> None:
    from . import build as builder
    from .data import MINI

    if options.stages[:1] in (["tldr"], ["tldr-results"]):
        from . import build_tldr

        build_tldr.command(options)
        return
    builder.build(
        options.output or MINI,
        options.stages,
        source=options.imdb,
        seed=options.seed,
        threads=options.threads,
    )


def zoo(options) -> None:
    from . import scales
    from . import zoo as animals

    scale = scales.chosen_scale(options.scale, options.micro_batch)
    folder = options.output or Path("outputs") / f"zoo-{scale.name}-seed{options.seed}"
    command = ["python", "-m", "rlhf_edu", "zoo", "--scale", scale.name, "--seed", str(options.seed)]
    command += ["--tuned", str(options.tuned)] if options.tuned else []
    path = animals.run(
        scale,
        options.seed,
        folder,
        tuned=options.tuned,
        threads=options.threads,
        command=shlex.join(command),
    )
    print(f"Done. The table is {path}")


def band(options) -> None:
    from . import zoo as animals
    from .band import gather_band

    zoos = any((folder / "zoo.csv").exists() for folder in options.folders)
    (animals.gather if zoos else gather_band)(options.folders, options.output)


def train(options) -> None:
    from . import recipe

    recipe.command(options)


def pin(options) -> None:
    from . import hub

    print(f"Pinned in {hub.TABLE}: {', '.join(hub.pin()) or 'nothing, all were'}")


def student(options) -> None:
    from . import editions

    print(
        editions.make(
            options.notebooks,
            options.output,
            variant_seed=options.variant_seed,
            variants_file=options.variants,
        )
    )


def grade(options) -> None:
    from . import grading, sandbox

    limits = sandbox.Limits(options.cell_seconds, options.seconds, options.memory_gb)
    summary = grading.grade(
        options.submissions, options.output, options.autograder, limits=limits, jobs=options.jobs
    )
    for problem in summary["problems"]:
        print(f"Look at this: {problem}")
    for name, total in summary["totals"].items():
        still = f", {total['open']} to be graded by you" if total["open"] else ""
        print(f"{name:30} {total['score']:6g} of {total['max']:g}{still}")
    print(
        f"Done; {summary['kept']} were graded before. Open {options.output / 'grades.csv'}, by_hand.csv, feedback/"
    )


def stamp(options) -> None:
    from . import colab

    changed = colab.stamp(options.notebooks)
    print(
        f"{', '.join(changed) or 'no notebook'} changed; in Colab they take the course from {colab.repository()}"
    )
    if colab.PLACEHOLDER in colab.repository():
        print("That is a placeholder: until pyproject.toml names a repository, only `bundle` serves Colab.")


def bundle(options) -> None:
    from . import colab

    path = colab.bundle(options.output, options.notebooks)
    print(f"{path}, {path.stat().st_size / 1e6:.0f} MB: put it into Colab's file panel, or into your Drive")


def quiet_libraries() -> None:
    """Their notes about kernels and missing heads are not for our readers; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
