"""A pretend GPU, for machines without one: its tensors compute on the CPU, but devices mix as badly as real ones.

It finds what goes wrong in code that was only ever run on a CPU: a tensor made on the other device, `.numpy()` of a
tensor on the GPU, a generator of the wrong device. It knows nothing of kernels, bf16, rounding, memory or speed.
The tensors call themselves `cuda`; PyTorch's C++ code takes them for `meta` tensors, which need no driver.

    python tests/pretend_gpu.py NOTEBOOK     run its cells there, and print a line for each that stops
"""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; `there` holds its numbers."""

    @staticmethod
    def __new__(cls, there):
        out = torch.Tensor._make_wrapper_subclass(
            cls, there.size(), strides=there.stride(), storage_offset=there.storage_offset(), dtype=there.dtype,
            device="meta", requires_grad=there.requires_grad,
        )  # fmt: skip
        out.there = there
        return out

    device = property(lambda self: GPU)
    is_cuda, is_cpu, is_meta = (property(lambda self, answer=a: answer) for a in (True, False, False))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(as_index(index))

    def __setitem__(self, index, value):
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(as_index(index), value)

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use .cpu() first")

    __array__ = numpy

    def data_ptr(self):
        return self.there.data_ptr()

    def untyped_storage(self):
        return self.there.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnGPU(self.there.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __format__(self, how):
        return format(self.item() if self.dim() == 0 else repr(self), how)

    def __repr__(self, **_):
        return f"OnGPU({self.there!r})"


class Everything(TorchDispatchMode):
    """Sees also what has no argument on the GPU, such as torch.zeros(3, device="cuda")."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def as_index(index):
    """Lists and arrays as PyTorch takes them: put where the indexed tensor is."""
    if isinstance(index, tuple):
        return tuple(map(as_index, index))
    return torch.tensor(index).to(GPU) if isinstance(index, list | np.ndarray) else index


def compute(function, args, kwargs):
    """One operation of PyTorch, refused where a GPU would refuse it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, OnGPU)]
    others = [x for x in tensors if not isinstance(x, OnGPU)]
    wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    copying = function is aten.copy_.default  # which is how tensors travel
    indexed_there = function in INDEXING and isinstance(args[0], OnGPU)  # it takes indices from the CPU too
    if on_gpu and not copying:
        values = args[2] if function in INDEXING and len(args) > 2 else None
        strangers = [x for x in others if x.is_cpu and x.dim() and x.numel()]  # a CPU scalar is taken along
        strangers = [x for x in strangers if x is values or not indexed_there]
        if strangers or function in INDEXING and not indexed_there:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})"
            )
    if is_gpu(wanted):
        kwargs = kwargs | {"device": CPU}
    without_numbers = any(x.is_meta for x in others)  # of a model that is only counted; what meets it is too
    there = lambda x: x.there.to("meta") if without_numbers else x.there
    plain = lambda x: there(x) if isinstance(x, OnGPU) else x
    result = function(*tree_map(plain, args), **tree_map(plain, kwargs))
    if wanted is not None:
        lands = is_gpu(wanted)
    else:
        lands = isinstance(args[0], OnGPU) if copying else bool(on_gpu) and not without_numbers
    same = {id(x.there): x for x in on_gpu}  # what was changed in place

    def landed(x):
        return same[id(x)] if id(x) in same else OnGPU(x) if lands and isinstance(x, torch.Tensor) else x

    return tree_map(landed, result)


class Travel(torch.autograd.Function):
    """From the CPU to the GPU; the gradient comes back. (Back to the CPU, PyTorch's own `to` does it.)"""

    @staticmethod
    def forward(ctx, here):
        return OnGPU(here.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cpu()


class Asked(TorchFunctionMode):
    """Knows whether Python asked for `meta`, or C++ code, such as the backward pass, that takes the GPU for it."""

    meta = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before, device = Asked.meta, (kwargs or {}).get("device")
        Asked.meta = device is not None and torch.device(device).type == "meta"
        try:
            return function(*args, **(kwargs or {}))
        finally:
            Asked.meta = before


def is_gpu(device) -> bool:
    kind = None if device is None else torch.device(device).type
    return kind == "cuda" or kind == "meta" and not Asked.meta


@contextlib.contextmanager
def pretend_gpu():
    """A GPU for as long as the block runs; models that were loaded before stay on the CPU."""
    to, make_generator = torch.Tensor.to, torch.Generator

    class Generator(make_generator):
        def __new__(cls, device="cpu"):
            out = make_generator.__new__(cls, "cpu")
            out.pretended = torch.device(device)
            return out

        device = property(lambda self: self.pretended)

    def moved(self, *args, **kwargs):
        target = next(
            (x for x in (*args, *kwargs.values()) if isinstance(x, str | torch.device | torch.Tensor)), None
        )
        target = target.device if isinstance(target, torch.Tensor) else target
        if target is None or torch.device(target).type != "cuda":
            return to(self, *args, **kwargs)
        dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), self.dtype)
        cast = to(self, dtype)
        return cast if isinstance(cast, OnGPU) else Travel.apply(cast)

    def making(make):
        def made(values, *args, device=None, **kwargs):
            if not isinstance(values, OnGPU):
                values = make(values, *args, **kwargs)
            return values if device is None else values.to(device)

        return made

    with pytest.MonkeyPatch.context() as patch, Asked(), Everything():
        patch.setattr(torch.Tensor, "to", moved)
        patch.setattr(torch, "Generator", Generator)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, making(getattr(torch, name)))
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # tied weights stay tied
        answers = {
            "is_available": True, "_lazy_init": None, "synchronize": None, "get_device_name": "a pretend GPU",
            "max_memory_allocated": 10**9, "is_bf16_supported": False, "device_count": 1, "current_device": 0,
            "device": contextlib.nullcontext(),
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        yield


def run_notebook(path: Path) -> list[str]:
    """Run its code cells; one line for each that stopped: where and with what."""
    from IPython.core.interactiveshell import InteractiveShell

    sys.modules["trl"] = None  # its trainers talk to the driver; notebook 12 goes on without
    shell, stopped = InteractiveShell.instance(), []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    with pretend_gpu():
        for number, cell in enumerate(cells):
            if cell["cell_type"] != "code":
                continue
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                ran = shell.run_cell("".join(cell["source"]))
            if error := ran.error_before_exec or ran.error_in_exec:
                frames = traceback.extract_tb(error.__traceback__)
                place = next(f for f in reversed(frames) if "torch" not in Path(f.filename).parts)
                said = (
                    f"{type(error).__name__}: {str(error)[:300]} [{Path(place.filename).name}: {place.line}]"
                )
                stopped.append(f"{path.stem} cell {number}: {said}")
    return stopped


if __name__ == "__main__":
    os.environ |= {"MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}
    notebook = Path(sys.argv[1]).resolve()
    os.chdir(notebook.parent)
    problems = run_notebook(notebook)
    print(*problems, sep="\n")
    sys.exit(bool(problems))
