"""FSDP: each process keeps its share of the weights, gradients and optimizer state, and fetches the rest when needed.

`accelerate launch --config_file configs/fsdp.yaml ...` turns it on. A layer's weights are gathered for its part of a
pass and dropped again; gradients are summed straight into the shares (Zhao et al. 2023; ZeRO, Rajbhandari et al. 2020).
Of the 16 bytes that AdamW needs for a float32 weight, each of N processes then holds 16 / N, and one layer more.
Sampling and evaluation gather all weights for as long as they take, and so do the first and the last moment of a run:
one copy of the weights must fit on each GPU. The shares are those of torch's `fully_shard`.
"""

import contextlib
import copy
import os
import types
import weakref

import torch

from . import parallel
from .errors import UserError

_spread = weakref.WeakKeyDictionary()  # each module of a model that is spread now -> what FSDP calls its root


def wanted() -> bool:
    """Whether the launcher was asked for FSDP."""
    flag = os.environ.get("ACCELERATE_USE_FSDP", "").lower()
    return parallel.processes() > 1 and flag in ("1", "true", "yes")


def is_spread(model) -> bool:
    return model in _spread


@contextlib.contextmanager
def spread(model):
    """The weights of `model` lie in shares while the block runs; afterwards each process has all of them again.

    FSDP changes the modules that it is given for good. So it gets twins of them, which the model uses as its parts
    meanwhile: then it is the model that it was. After an error it stays spread; start the run again. What is no module
    (`lora.Reference`) has no weights of its own.
    """
    if not wanted() or is_spread(model) or not isinstance(model, torch.nn.Module):
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = parallel.state().device
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(
            f"torch {torch.__version__} has FSDP for GPUs only: install a newer one, or turn FSDP off"
        )
    parameters, modules = list(model.parameters()), list(model.modules())
    mesh = init_device_mesh(device.type, (parallel.processes(),))
    before = [(dict(m._parameters), dict(m._modules)) for m in modules]
    twins = {m: _twin(m) for m in modules}
    for m in modules:
        m._modules.update({name: twins[child] for name, child in m._modules.items() if child is not None})
    root = twins[model]
    for blocks in [m for m in root.modules() if isinstance(m, torch.nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
    root.run = types.MethodType(lambda self, function, *args: function(*args), root)
    register_fsdp_forward_method(root, "run")
    root.run(lambda: None)  # FSDP looks at its root once, which no part may be before
    _spread.update(dict.fromkeys(modules, root))
    yield
    for parameter, share in zip(parameters, list(root.parameters()), strict=True):
        parameter.data = share.full_tensor().detach()
    for m, (own, children) in zip(modules, before, strict=True):
        m._parameters.update(own)
        m._modules.update(children)
        m.training = root.training
        del _spread[m]


def _twin(module):
    """Another module with the same parameters, buffers and children, and hooks of its own."""
    twin = copy.copy(module)
    shared = ("_parameters", "_buffers", "_modules")
    own = {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, dict) and k not in shared}
    vars(twin).update(own)
    return twin


def run(model, function, *args):
    """function(*args), which passes through `model` and may be differentiated."""
    return _spread[model].run(function, *args) if is_spread(model) else function(*args)


@contextlib.contextmanager
def whole(model):
    """Each process has all weights while the block runs, to sample and to score; all processes must come here."""
    if not is_spread(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [m for m in _spread[model].modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def agreed(model, mine: bool) -> bool:
    """What the main process says, where all must do the same; each says its own otherwise."""
    if not is_spread(model):
        return mine
    device = next(model.parameters()).device
    return bool(parallel.all_sum(torch.tensor(float(mine and parallel.is_main()), device=device)))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may lie in shares; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shares_as(parameter, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole in each process, laid out as `parameter` is."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
