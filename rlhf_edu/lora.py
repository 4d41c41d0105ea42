"""LoRA: the weights W stay, and h = W x + (alpha / rank) B A x learns two thin matrices (Hu et al. 2021, eq. 3).

B starts at 0, so the policy starts as the model it was made from. Its reference is the same model with the adapter
switched off: no second copy. The layers are those of `peft`; they are put into the model in place, which stays the
transformers model it was, so everything in this package trains, samples and scores it as before.
"""

import contextlib
import copy
import shutil
from pathlib import Path

import torch

from .errors import FREE_SPACE, UserError, explained
from .models import put_in_place

ADAPTER = "adapter_model.safetensors"


def add_lora(policy, *, rank: int = 16, alpha: float = 32.0, seed: int = 0):
    """Put an adapter on all linear layers of `policy` but the last, in place; only the adapter learns from then on."""
    peft = _peft()
    if rank < 1:
        raise UserError(f"the rank of LoRA is {rank}: make it 1 or more")
    if _layers(policy):
        raise UserError("the policy has an adapter already: load it anew to put another one on it")
    transposed = any(type(m).__name__ == "Conv1D" for m in policy.modules())  # GPT-2 stores W transposed
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy.add_adapter(config)  # A is drawn, B is 0; all other weights are frozen
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # also where the frozen weights are bfloat16
    return policy


class Reference:
    """The policy without its adapter, for everything that computes log-probs; it holds no weights of its own."""

    def __init__(self, policy):
        if not _layers(policy):
            raise UserError("the policy has no adapter to switch off: call lora.add_lora(policy) first")
        self.policy = policy

    device = property(lambda self: self.policy.device)
    config = property(lambda self: self.policy.config)

    def base_model(self, *args, **kwargs):
        with adapter_off(self.policy):
            return self.policy.base_model(*args, **kwargs)

    def get_output_embeddings(self):
        return self.policy.get_output_embeddings()  # it has no adapter


@contextlib.contextmanager
def adapter_off(policy):
    """The model that the policy was made from, while the block runs."""
    learning = [(p, p.requires_grad) for p in policy.parameters()]  # peft's switch sets these as well
    for layer in _layers(policy):
        layer.enable_adapters(False)
    try:
        yield policy
    finally:
        for layer in _layers(policy):
            layer.enable_adapters(True)
        for parameter, learns in learning:
            parameter.requires_grad_(learns)


def merged(policy):
    """A plain model with W + (alpha / rank) B A for W: to ship, and to sample faster."""
    policy = copy.deepcopy(policy)
    for layer in _layers(policy):
        layer.merge()
    for parent in list(policy.modules()):
        for name, child in list(parent.named_children()):
            if child in _layers(policy):
                setattr(parent, name, child.get_base_layer())
    policy._hf_peft_config_loaded = False  # so that save_pretrained writes the whole model
    return policy.requires_grad_(False)


def save_adapter(policy, folder: str | Path) -> None:
    """The adapter alone, a few megabytes, as `peft` reads it; atomic."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    with explained(f"saving {folder}", FREE_SPACE):
        shutil.rmtree(temporary, ignore_errors=True)
        policy.save_pretrained(temporary, safe_serialization=True)
        put_in_place(temporary, folder)


def load_adapter(policy, folder: str | Path):
    """Put a saved adapter on the model that it was trained on, in place; it does not learn."""
    _peft()
    if not (Path(folder) / ADAPTER).is_file():  # and never a pickled one
        raise UserError(f"there is no {ADAPTER} in {folder}: name the folder that lora.save_adapter wrote")
    with explained(f"loading the adapter {folder}", "load the model that it was trained on first"):
        policy.load_adapter(str(Path(folder).resolve()))
    return policy.eval()


def _peft():
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError('LoRA needs peft: run `pip install -e ".[gpu]"`') from error
    return peft


def _layers(policy) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
