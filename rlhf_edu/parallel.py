"""Several processes at one run: who writes, who computes what, and one sum that puts the shares together.

`accelerate launch -m rlhf_edu ...` starts the processes and tells each its device. Every process knows the whole
batch and computes its share; whatever is random follows from the seed and the step, so all agree without talking.
The processes must see the same files.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Sequence

import torch

from .errors import UserError


def processes() -> int:
    """How many processes work at this run: 1, unless a launcher started several."""
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if processes() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@functools.cache
def state():
    """Accelerate's state: made once, it joins the processes (NCCL on GPUs, gloo on CPUs)."""
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise UserError("several processes need accelerate: pip install -e '.[gpu]'") from error
    # or, under FSDP, transformers would leave the weights of all processes but the first at 0 and expect them to be sent
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    with together():
        return PartialState(cpu=not torch.cuda.is_available())


def device() -> torch.device:
    """The device of this process."""
    if processes() > 1:
        return state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def together():
    """A clear word in the processes that are left when another one died."""
    try:
        yield
    except RuntimeError as error:  # gloo says it so; NCCL's processes are ended by the launcher
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"process {rank()} lost touch with another process of this run: see what that one said last, then start "
            "the same command again, which goes on from the last checkpoint"
        ) from error


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if processes() > 1:
        state()
        with together():
            torch.distributed.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Until every process is here: before reading what the main one wrote."""
    if processes() > 1:
        with together():
            state().wait_for_everyone()


def remove(folder) -> None:
    """Delete a folder, once for all processes."""
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)


def share(count: int) -> range:
    """Which of `count` things this process does; of things sorted by length all get as long ones."""
    return range(rank(), count, processes())


def from_all(mine: dict[int, torch.Tensor], count: int, device) -> list[torch.Tensor]:
    """`count` 1-D tensors of any lengths, of which this process made those in `mine`; all float64 if there are several."""
    if processes() == 1:
        return [mine[i] for i in range(count)]
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    for i, values in mine.items():
        lengths[i] = len(values)
    sizes = all_sum(lengths).tolist()
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    parts = flat.split(sizes)
    for i, values in mine.items():
        parts[i].copy_(values)  # into `flat`; the others add zeros, which changes nothing
    all_sum(flat)
    return list(parts)


def per_row(function, count: int, device) -> torch.Tensor:
    """(count,) the values function(rows) gives for all rows, each process computing its share of them."""
    if processes() == 1:
        return function(range(count))
    values, rows = torch.zeros(count, dtype=torch.float64, device=device), share(count)
    if len(rows):
        values[list(rows)] = function(rows).to(values)
    return all_sum(values)


def spread(rows: Sequence, count: int) -> list[list]:
    """Rows sorted by length as `count` parts of about equal lengths, none empty."""
    return [list(rows[k::count]) for k in range(min(count, len(rows)))]
