"""The one training loop: device, schedule, clipping, checkpoint and resume, metrics. No algorithm lives here.

A trainer gives two functions: `batch_of(step)` and `loss_of(batch)`. Everything random in a batch is derived
from the seed and the step, so a run that was interrupted and resumed ends with the numbers of one that was
not, and nothing about random states has to be stored.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from . import parallel, sharding
from .errors import FREE_SPACE, UserError, explained

SCHEDULES = ("cosine", "linear", "constant")
MICRO_BATCH = "--micro-batch {} (in a file of `train`: micro_batch), what is finished is kept"
GPU_LOG_EVERY = 10  # updates; reading a number makes the CPU wait for the GPU


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    learning_rate: float
    warmup: float = 0.1  # share of the steps over which the rate rises from 0 (SimPO and TRL use 10 %)
    schedule: str = "cosine"  # after the warm-up: cosine to `final`, linear to `final`, or constant
    final: float = 0.1  # share of the learning rate that is left at the end (InstructGPT App. C: 10 %)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)  # InstructGPT App. C
    max_grad_norm: float = 1.0
    seed: int = 0
    log_every: int = 1  # updates between two looks at the numbers; on a GPU `GPU_LOG_EVERY` at least
    save_seconds: float = 20.0  # how much work an interruption may cost


@dataclasses.dataclass(frozen=True)
class Memory:
    """How an update fits into the device. Changes no result, but for rounding (bf16 rounds to 3 digits)."""

    micro_batch: int | None = (
        None  # pairs, texts or episodes of one pass on one device; None: the whole batch
    )
    bf16: bool = (
        False  # matrix products in bfloat16, where a GPU has it; weights, softmax and losses stay float32
    )
    checkpointing: bool = False  # compute activations again for the backward pass instead of keeping them


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Rate of update `step` (0-based)."""
    if config.schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {config.schedule!r}: use one of {', '.join(SCHEDULES)}")
    warmup_steps = math.ceil(config.warmup * config.steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    if config.schedule == "constant":
        return config.learning_rate
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final + (1 - config.final) * share)


def rng(seed: int, *path: int) -> np.random.Generator:
    """A generator that depends on the seed and on where in the run it is used, never on what ran before."""
    if seed < 0:
        raise UserError(f"the seed is {seed}: use 0 or a positive whole number")
    return np.random.default_rng([seed, *path])


def torch_rng(seed: int, *path: int, device="cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(int(rng(seed, *path).integers(2**62)))


def epoch_order(size: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices of batch `step` when the data is reshuffled each epoch; a last part batch is dropped."""
    if size < 1:
        raise UserError("there is no training data: the data set is empty")
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}: make it 1 or more")
    batch_size = min(batch_size, size)
    epoch, place = divmod(step, size // batch_size)
    return rng(seed, epoch).permutation(size)[place * batch_size : (place + 1) * batch_size]


def set_threads(threads: int | None = None) -> None:
    """One setting for the whole process: all cores that this process may use, and no denormal slow-downs."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc: then without
            libc = ctypes.CDLL("libc.so.6")
            # keep freed memory instead of giving every large tensor back to the kernel and faulting it in again:
            # a training step takes about a tenth less time
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, (available or 1) // parallel.processes()))
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def only_one(folder: Path | None):
    """Nobody else works in `folder` meanwhile, or a clear word. The system forgets the lock of a process that was killed.

    Windows and file systems without locks are not guarded.
    """
    descriptor = None
    if folder:
        with explained(f"saving into {folder}", "choose another folder or free some space"):
            Path(folder).mkdir(parents=True, exist_ok=True)
    if folder and os.name == "posix" and parallel.is_main():
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(
                f"another process is working in {folder}: wait until it has ended, or choose another folder"
            ) from error
        except OSError:
            pass  # no locks here
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _alone_and_spread(function):
    """Nobody else works in the folder, and the model lies in shares if the launcher was asked for FSDP."""

    @functools.wraps(function)
    def guarded(model, *args, folder=None, **kwargs):
        with only_one(folder), sharding.spread(model):
            return function(model, *args, folder=folder, **kwargs)

    return guarded


@_alone_and_spread
def train(
    model: torch.nn.Module,
    batch_of: Callable,
    loss_of: Callable,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    fingerprint: dict | None = None,
    after_step: Callable[[int], dict | None] | None = None,
    state: dict | None = None,
    save_multiple: int = 1,
    progress: Callable[[float, str], None] | None = None,
    watch: Callable[[dict], None] | None = None,
    split: Callable | None = None,
    memory: Memory = Memory(),
) -> pd.DataFrame:
    """Run `config.steps` updates of AdamW and return the metrics, one row an update.

    batch_of(step) -> anything; loss_of(batch) -> (scalar loss, dict of scalar tensors or floats).
    split(batch, count) -> at most `count` parts [(part, weight)] for micro-batches and several processes: the loss
    of the batch, a sequence of rows, is the mean of `loss_of(part)` with these weights.
    after_step(step) runs after `step` updates (0 before the first) and may return more metrics for that row; what
    passes through the model there does so inside `sharding.whole(model)`.
    folder: where `state.safetensors` is kept for resuming; removed by the caller when its result is stored.
    state: a dict of floats that the trainer changes and that must survive a resume (e.g. a KL coefficient).
    save_multiple: save only after a multiple of so many updates (PPO: whole rollouts).
    watch(row) is given a copy of each row of metrics once it is complete, e.g. a `widgets.LivePlot`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(
            "the model is frozen, so nothing could be learned: call model.requires_grad_(True) first"
        )
    device = parameters[0].device
    log_every = config.log_every if device.type == "cpu" else max(config.log_every, GPU_LOG_EVERY)
    if memory.checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    identity = json.dumps(
        {"config": dataclasses.asdict(config), **(fingerprint or {})}, sort_keys=True, default=str
    )
    path = Path(folder) / "state.safetensors" if folder else None
    rows: list[dict] = []
    step = 0
    if path and path.exists():
        step, rows, saved_state = load_state(path, model, optimizer, identity)
        if state is not None:
            state.update(saved_state)
    elif after_step:
        rows.append({"step": 0, **(after_step(0) or {})})
    pending: list[dict] = []
    watched = 0
    last_save = time.monotonic()

    def flush():  # reads the numbers of the last updates from the device, and looks at them
        while pending:
            row = {k: v.item() if torch.is_tensor(v) else v for k, v in pending.pop(0).items()}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise UserError(
                    f"the loss became {row['loss']} (gradient norm {row['grad_norm']}) at step {row['step']} of "
                    f"{config.steps}; lower the learning rate (now {config.learning_rate:g}) or look at that "
                    f"batch, number {row['step'] - 1} of seed {config.seed}"
                )
            rows.append(row)

    def show():
        nonlocal watched
        for row in rows[watched:] if watch else ():
            watch(dict(row))
        watched = len(rows)

    show()
    while step < config.steps:
        model.train()  # dropout is 0 in all our models; train mode only says that gradients are wanted
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = gradients(model, parameters, batch_of, step, loss_of, split, memory)
        norm = sharding.full(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        if device.type == "cpu" and not torch.isfinite(
            norm
        ):  # on a CPU looking costs nothing: keep weights sound
            pending.append({"step": step + 1, "loss": loss, "grad_norm": norm})
            flush()
        optimizer.step()
        step += 1
        pending.append({"step": step, "loss": loss, "grad_norm": norm, **metrics})
        if step % log_every == 0 or step == config.steps:
            flush()
        if after_step and (extra := after_step(step)):
            flush()
            rows[-1].update(extra)
        show()
        if progress:
            progress(step / config.steps, f"step {step}/{config.steps}")
        due = time.monotonic() - last_save > config.save_seconds
        if path and step % save_multiple == 0 and step < config.steps and sharding.agreed(model, due):
            flush()
            save_state(path, model, optimizer, step, rows, identity, state or {})
            last_save = time.monotonic()
    model.eval()
    return pd.DataFrame(rows)


def gradients(model, parameters, batch_of, step: int, loss_of, split, memory: Memory):
    """Leave the gradient of batch `step` in the parameters; (loss, metrics) of the whole batch, without gradient.

    The batch is cut into micro-batches, and several processes share them. Each counts by its weight among all, so
    that any number of parts and processes gives the gradient of the batch as one.
    """
    device = parameters[0].device
    with enough_memory(None), precision(memory, device):
        batch = batch_of(step)
    several, spread = parallel.processes(), sharding.is_spread(model)
    if split is None:  # each process computes all of it
        parts = [(batch, 1.0)] * several
    else:
        passes = math.ceil(len(batch) / (several * (memory.micro_batch or len(batch))))
        parts = split(batch, several * passes)
        parts += [(parts[0][0], 0.0)] * (
            -len(parts) % several
        )  # as many for each process, so that all keep step
    total, totals = sum(weight for _, weight in parts), None
    for part, weight in parts[parallel.rank() :: several]:
        with enough_memory(part if split else None):
            with precision(memory, device):
                loss, metrics = sharding.run(model, loss_of, part)
            if len(parts) == 1:
                loss.backward()
                return loss.detach(), metrics
            (loss * (weight / total * (several if spread else 1))).backward()  # FSDP averages over processes
        numbers = {"loss": loss.detach(), **{k: v for k, v in metrics.items() if torch.is_tensor(v)}}
        values = torch.stack([v.to(device, torch.float64) for v in numbers.values()]) * (weight / total)
        totals = values if totals is None else totals + values
    if several > 1 and not spread:
        for p in parameters:
            p.grad = parallel.all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
    averaged = dict(zip(numbers, parallel.all_sum(totals).unbind(), strict=True))
    return averaged["loss"], {k: averaged.get(k, v) for k, v in metrics.items()}


def precision(memory: Memory, device):
    """The arithmetic of forward passes: bfloat16 products if wanted and there, else the weights' own."""
    if memory.bf16 and has_bf16(device):
        return torch.autocast(torch.device(device).type, torch.bfloat16)
    return contextlib.nullcontext()


def has_bf16(device) -> bool:
    """Whether the device computes bfloat16 itself (NVIDIA: Ampere or newer; a T4 only imitates it)."""
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def checkpoint_activations(model) -> None:
    """Turn gradient checkpointing on in the transformers model that is, or is in, `model`."""
    for module in model.modules():
        if hasattr(module, "activation_checkpointing_enable"):  # the name from transformers 6 on
            module.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            return
        if hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
    raise UserError("gradient checkpointing needs a transformers model: turn checkpointing off")


@contextlib.contextmanager
def enough_memory(rows, option: str = MICRO_BATCH):
    """One sentence where a GPU's memory does not hold a pass over `rows`, whose number goes into `option`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if rows is not None and len(rows) > 1:
            advice = f"start again with {option.format(len(rows) // 2)}"
            raise UserError(f"the GPU's memory does not hold {len(rows)} rows at once: {advice}") from error
        raise UserError(
            "the GPU's memory is too small for this model: take a smaller scale, LoRA, or more GPUs with FSDP"
        ) from error


def save_state(path: Path, model, optimizer, step: int, rows: list[dict], identity: str, state: dict) -> None:
    """Everything needed to go on, in one file that is replaced in one step; frozen weights do not change."""
    if not (parallel.is_main() or sharding.is_spread(model)):
        return
    trained = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for index, values in optimizer.state_dict()["state"].items():
        trained |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
    tensors = {}
    for name, tensor in trained.items():
        tensor = sharding.full(tensor)  # all processes give their share of one after the other
        if parallel.is_main():
            tensors[name] = tensor.cpu() if sharding.is_spread(model) else tensor.contiguous()
    if not parallel.is_main():
        return
    metadata = {"step": str(step), "rows": json.dumps(rows), "identity": identity, "state": json.dumps(state)}
    with explained(f"saving {path}", FREE_SPACE), replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_state(path: Path, model, optimizer, identity: str) -> tuple[int, list[dict], dict]:
    advice = "delete this file to start this run afresh"
    with explained(f"reading {path}", advice), safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["identity"] != identity:
            raise UserError(
                f"{path} belongs to a run with other settings; delete it or choose another folder"
            )
        for name, p in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
            tensor = file.get_tensor(f"model.{name}")
            if tensor.shape != p.shape:  # copy_ would broadcast
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} there, {tuple(p.shape)} here")
            p.data.copy_(sharding.shares_as(p, tensor))
        per_parameter: dict[int, dict] = {}
        for key in file.keys():  # noqa: SIM118 (the file is no mapping)
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                tensor = sharding.shares_as(
                    optimizer.param_groups[0]["params"][int(index)], file.get_tensor(key)
                )
                per_parameter.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": per_parameter})
        return int(metadata["step"]), json.loads(metadata["rows"]), json.loads(metadata["state"])


class replacing:
    """`with replacing(path) as temporary:` write `temporary`; on success it becomes `path` in one step.

    Of several processes the main one's file is kept; all of them hold the same.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and parallel.is_main():
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
