"""Text to token ids and back: the only file that knows padding, EOS and where a response begins.

Conventions, the same everywhere in the course:
- prompt and response are tokenized separately, so no token spans the boundary;
- a response ends with EOS, and EOS counts: it is in the response mask and in the length;
- padding is on the right and has a token of its own (a pad that equals EOS would hide real ends);
- the response mask is true on response tokens and EOS, never on the prompt or on padding.
"""

import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from . import hub, sharding
from .errors import UserError, explained

END = "<|endoftext|>"  # as in GPT-2; it also stands in front of a review where a text starts from nothing
PAD = "<|pad|>"


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` can only be meant for the hub: there is no such folder, and it does not look like a path."""
    name, path = str(name), Path(name)
    if name.startswith((".", "~", "data/")) or path.is_absolute() or path.is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def require_hub(name: str) -> None:
    """Say at once that the hub cannot be reached; its own client takes a minute of retries to find out."""
    cached = try_to_load_from_cache(name, "config.json", revision=hub.revision(name))
    if constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as error:
        raise UserError(
            f"{name} is no folder here, and as a name of the hub it is not on this machine and the hub cannot be "
            "reached; check the path, connect to the network once, or use --scale mini"
        ) from error


def is_folder(name: str | Path, what: str) -> bool:
    """Whether `name` is a folder here, and not a name of the hub that can be reached; a word if it is neither."""
    if Path(name).is_dir():
        return True
    if not is_hub_name(name):
        raise UserError(
            f"there is no {what} folder {name}: check the folder, or restore it with `git checkout data`"
        )
    require_hub(str(name))
    return False


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a checkpoint, or one of the hub (`gpt2`), with a padding token."""
    if local := is_folder(folder, "tokenizer"):
        advice = "check the folder, or restore it with `git checkout data`"
    else:
        advice = "connect to the network once, or use --scale mini"
    with explained(f"loading the tokenizer of {folder}", advice):
        revision = "main" if local else hub.revision(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=local, revision=revision)
    if tokenizer.pad_token_id is None:  # GPT-2 has none; any id serves, since the masks decide what counts
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def train_tokenizer(texts, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, learned from `texts`."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(texts, vocab_size=vocabulary_size, special_tokens=[END, PAD], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone, without special tokens."""
    texts = list(texts)
    if not texts:
        return []
    if bad := [t for t in texts if not isinstance(t, str)]:
        raise UserError(f"a text must be a string, not {type(bad[0]).__name__}: {bad[0]!r:.60}")
    try:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except (TypeError, UnicodeError) as error:
        raise UserError(
            "a text holds half of a character (a lone surrogate) and cannot be tokenized: read the file as UTF-8"
        ) from error


def encode_responses(tokenizer, responses: Sequence[str], *, max_tokens: int) -> list[list[int]]:
    """Ids of each response with EOS; a response that is too long keeps its start and then has no EOS."""
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}: a response needs room for one token, EOS, at least")
    return [[*ids, tokenizer.eos_token_id][:max_tokens] for ids in encode(tokenizer, responses)]


def decode_responses(tokenizer, responses: Sequence[Sequence[int]]) -> list[str]:
    # of an empty list, transformers makes one empty text
    return (
        tokenizer.batch_decode([list(r) for r in responses], skip_special_tokens=True)
        if len(responses)
        else []
    )


def by_length(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the sequences, the shortest first; batches in this order hold little padding."""
    if len(prompts) != len(responses):
        raise UserError(
            f"{len(prompts)} prompts do not go with {len(responses)} responses: give one response for each prompt"
        )
    return sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device="cpu"):
    """Right-padded `{"input_ids", "attention_mask", "response_mask"}`, each (batch, time)."""
    by_length(prompts, responses)
    if not len(prompts):
        raise UserError(
            "there are no sequences to put into a batch: give one prompt and its response at least"
        )
    if not all(len(p) for p in prompts):
        raise UserError(
            "an empty prompt has no token that could predict the response: give each at least one token"
        )
    time = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), time), pad_id)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        attention[row, :end] = 1
        mask[row, len(prompt) : end] = True
    return {
        "input_ids": ids.to(device),
        "attention_mask": attention.to(device),
        "response_mask": mask.to(device),
    }


def chunk_rows(device) -> int:
    """Length-sorted sequences to compute at once. On a CPU few: little padding, and layers stay in its cache."""
    return 16 if torch.device(device).type == "cpu" else 64


def pass_rows(device) -> int:
    """Sequences of a pass that is differentiated: `chunk_rows`; under FSDP all, as processes must make equally many."""
    return 2**30 if sharding.wanted() else chunk_rows(device)


def prefix_lengths(tokenizer, ids: Sequence[int], shortest: int = 2, longest: int = 8) -> list[int]:
    """The lengths in [shortest, longest] at which a prefix of `ids` ends with a whole word.

    A prompt cut inside a word ("the mov") would be tokenized otherwise when it is read back as text.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids[: longest + 1]))
    return [n for n in range(shortest, min(longest, len(ids) - 1) + 1) if pieces[n].startswith("Ġ")]
