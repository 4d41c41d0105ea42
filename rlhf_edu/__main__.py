"""The command line: `python -m rlhf_edu reproduce`, `build`, `band`; each with --help."""

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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m rlhf_edu", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser(
        "reproduce", help="the main job: the IMDb frontier and the length plots, in outputs/"
    )
    add.add_argument("--scale", help="smoke, mini (default), gpt2 or paper; also RLHF_EDU_SCALE")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--output", type=Path, help="the run folder (default: outputs/SCALE-seedN)")
    add.add_argument(
        "--imdb", help="take prompts from real reviews: an IMDb folder, or hub; also RLHF_EDU_IMDB"
    )
    add.add_argument("--methods", help="only these of the frontier, e.g. DPO,PPO,SimPO")
    add.set_defaults(command=reproduce)

    add = commands.add_parser("build", help="train the shipped checkpoints again from IMDb")
    add.add_argument(
        "stages", nargs="*", default=[], help="tokenizer, base, sft, oracle, prompts, reward (default: all)"
    )
    add.add_argument("--imdb", help="an IMDb folder, or hub; also RLHF_EDU_IMDB")
    add.add_argument("--output", type=Path, help="where the checkpoints go (default: data/models/mini)")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument(
        "--threads", type=int, help="CPU threads (default: all), e.g. 1 each for two stages at once"
    )
    add.set_defaults(command=build)

    add = commands.add_parser("band", help="gather finished runs of several seeds into data/results/SCALE")
    add.add_argument("folders", nargs="+", type=Path)
    add.add_argument("--output", type=Path, required=True)
    add.set_defaults(command=band)
    return top


def reproduce(options) -> None:
    from . import experiments, scales

    scale = scales.chosen_scale(options.scale)
    folder = options.output or Path("outputs") / f"{scale.name}-seed{options.seed}"
    source = options.imdb or os.environ.get("RLHF_EDU_IMDB") or None
    only = options.methods.split(",") if options.methods else None
    command = shlex.join(
        ["python", "-m", "rlhf_edu", "reproduce", "--scale", scale.name, "--seed", str(options.seed)]
    )
    path = experiments.reproduce(scale, options.seed, folder, imdb_source=source, only=only, command=command)
    print(f"Done. Open {path}")


def build(options) -> None:
    from . import build as builder
    from .data import MINI

    builder.build(
        options.output or MINI,
        options.stages,
        source=options.imdb,
        seed=options.seed,
        threads=options.threads,
    )


def band(options) -> None:
    from . import experiments

    experiments.gather_band(options.folders, options.output)


def quiet_libraries() -> None:
    """Their notes about kernels and missing heads are not for our readers; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
