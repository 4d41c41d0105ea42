"""Policies, reward models and the value head. All of them are transformers models, loaded from safetensors only.

- policy: a causal language model (`GPT2LMHeadModel` here), usable by `from_pretrained`, `pipeline` and TRL as saved;
- reward model: a sequence classifier with one output, read at the last token, which is EOS;
- oracle: a sequence classifier with two outputs (negative, positive);
- value model (PPO): a policy with one more linear layer on its last hidden state.
"""

import contextlib
import copy
import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.utils import logging as transformers_logging

from . import hub, parallel
from .errors import FREE_SPACE, UserError, explained
from .logprobs import in_vocabulary
from .tokens import is_folder

FUSED_GELU = "gelu_pytorch_tanh"  # GPT-2's own function; transformers computes its `gelu_new` in seven steps


def mini_config(
    tokenizer, *, layers: int = 4, width: int = 192, heads: int = 6, context: int = 64
) -> GPT2Config:
    """The largest GPT-2 with which the main job keeps its time on two cores."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function=FUSED_GELU,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_policy(tokenizer, seed: int, **size) -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(mini_config(tokenizer, **size)).eval()


def best_device() -> torch.device:
    return parallel.device()


# settings that change what the output embedding gives, and the values at which they do not (Gemma 2, Granite, Cohere)
HEADS = {
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
}


def load_policy(name: str | Path, device=None, dtype=torch.float32) -> torch.nn.Module:
    return _load(AutoModelForCausalLM, name, device, dtype)


def load_classifier(name: str | Path, device=None) -> torch.nn.Module:
    """A reward model (one label) or a sentiment oracle (two labels)."""
    return _load(AutoModelForSequenceClassification, name, device)


def _load(kind, name: str | Path, device, dtype=torch.float32):
    name = str(name)
    local = is_folder(name, "model")
    transformers_logging.disable_progress_bar()  # our models load in a blink
    advice = (
        "restore the folder or train it again" if local else "connect to the network, or use --scale mini"
    )
    with explained(f"loading the model {name}", advice), safetensors_only(name):
        model, report = kind.from_pretrained(
            name,
            use_safetensors=True,
            dtype=dtype,
            local_files_only=local,
            revision="main" if local else hub.revision(name),
            output_loading_info=True,
        )
        if local and (report["missing_keys"] or report["mismatched_keys"]):
            raise UserError(
                f"the model in {name} is damaged: {len(report['missing_keys'])} weights are missing; {advice}"
            )
    if scaled := [k for k, plain in HEADS.items() if getattr(model.config, k, plain) not in (None, plain)]:
        raise UserError(
            f"{name} has {scaled[0]} in its config: its logits are more than one linear layer, which the course's "
            "log-probs do not know; take another policy"
        )
    return fused_gelu(without_dropout(model)).to(device or best_device()).eval()


@contextlib.contextmanager
def safetensors_only(name: str):
    """A word about a folder or commit that has weights, but only in a format that runs code when it is opened."""
    try:
        yield
    except OSError as error:
        if "does not appear to have a file named model.safetensors" not in str(error):
            raise
        raise UserError(
            f"{name} has no model.safetensors, and the course opens no pickled weights: save it as safetensors, or pin "
            "a commit that has it in data/hub.json (often an open pull request on the model's page)"
        ) from error


def without_dropout(model):
    """Dropout off for good: a policy and a reference that drop different units disagree about themselves."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def fused_gelu(model):
    """GPT-2's activation `gelu_new` as one kernel: the same function to float32 rounding, much less memory traffic."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(part, name, ACT2FN[FUSED_GELU])
    if getattr(model.config, "activation_function", None) == "gelu_new":
        model.config.activation_function = FUSED_GELU
    return model


def classifier_from(policy, labels: int, seed: int) -> GPT2ForSequenceClassification:
    """A classifier whose body starts as a copy of the policy's and whose head is N(0, 1/(d+1)), as in Ziegler et al."""
    config = copy.deepcopy(policy.config)
    config.num_labels = labels
    if config.pad_token_id is None:  # the hub's GPT-2; `load_tokenizer` pads with EOS there
        config.pad_token_id = config.eos_token_id
    if labels == 2:
        config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return without_dropout(model).to(policy.device).eval()


def class_logits(model, batch) -> torch.Tensor:
    """(batch, labels) of a sequence classifier; a causal one is read at the last token, by length.

    transformers looks for the last token that is not padding; where EOS also pads, the end would never be read.
    """
    if not hasattr(model, "score"):  # an encoder with a head of its own
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with in_vocabulary(getattr(model.config, "vocab_size", "this model")):
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = model.score(hidden.last_hidden_state)
    last = batch["attention_mask"].sum(1) - 1
    return logits[torch.arange(len(last), device=last.device), last]


class ValueModel(torch.nn.Module):
    """A policy and a value head that starts at 0 (Ziegler et al.); both are read from one pass."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.value = torch.nn.Linear(policy.config.hidden_size, 1).to(policy.device)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)


def copy_of(model):
    """An independent copy, e.g. the frozen reference."""
    return copy.deepcopy(model).eval()


@torch.no_grad()
def at_temperature(policy, temperature: float):
    """Divide the policy's logits by `temperature`, in place: sampling at 1 then is what it was at `temperature`.

    Ziegler et al. 2019 sample and score at 0.7. Folded into the last layer norm it is part of the policy, and
    nothing that samples or scores can forget it.
    """
    norm = policy.base_model.ln_f
    norm.weight /= temperature
    norm.bias /= temperature
    return policy


def freeze(model):
    return model.requires_grad_(False).eval()


def save_model(model, tokenizer, folder: str | Path, card: dict | None = None, *, half: bool = False) -> None:
    """Save model and tokenizer so that `from_pretrained(folder)` and `pipeline` take them; atomic.

    half: store float16 weights (half the bytes; the shipped checkpoints), still loaded as float32.
    """
    if not parallel.is_main():
        return
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    transformers_logging.disable_progress_bar()
    with explained(f"saving {folder}", FREE_SPACE):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            stored = copy.deepcopy(model).half() if half else model
            stored.save_pretrained(temporary, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            config = json.loads((temporary / "config.json").read_text())
            config["dtype"] = "float32"
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if card:
                (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n")
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to its name; an earlier one of that name goes only when the new one is there."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
