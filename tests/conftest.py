"""What the tests share: no network, one thread, a tiny tokenizer, tiny policies and made-up film reviews."""

import os
import tempfile

_no_hub = tempfile.TemporaryDirectory(
    prefix="rlhf_edu_no_hub_"
)  # an empty cache: nothing of the hub is found
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    HF_HOME=_no_hub.name,
)
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "RLHF_EDU_SCALE", "RLHF_EDU_IMDB"):
    os.environ.pop(_name, None)

import contextlib
import copy
import itertools

import datasets
import pytest
import torch
from tiny_scale import smoke_scale

from rlhf_edu import models, ppo, sft, tokens, training
from rlhf_edu.errors import UserError

torch.set_num_threads(1)  # models this small lose time to a second thread
# Nor may a test leave more behind: a fork of a process that has used two waits for the other one for ever.
torch.set_num_threads = lambda number: None

GOOD = ("great", "lovely", "moving", "funny")
BAD = ("awful", "boring", "weak", "silly")


def review(*choice: int) -> str:
    """A made-up review of one or two sentences; six numbers choose its words."""
    who = ("The film", "This movie", "The plot", "Her acting", "His music")[choice[0] % 5]
    mood = (GOOD + BAD)[choice[1] % 8]
    tail = ("", " to the end", " from the start", " and too long")[choice[2] % 4]
    more = ("", " I saw it twice.", " Do not miss it!", " We left early.")[choice[3] % 4]
    return f"{who} was {mood}{tail}.{more}"


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return [review(*choice) for choice in itertools.product(range(5), range(8), range(4), range(4))]


@pytest.fixture(scope="session")
def tokenizer(sentences):
    return tokens.train_tokenizer(sentences, 320)


@pytest.fixture
def policy(tokenizer):
    """A random policy, new for every test."""
    return models.new_policy(tokenizer, 0, layers=1, width=32, heads=2)


@pytest.fixture(scope="session")
def demonstrations(tokenizer, sentences):
    """(prompt ids, response ids with EOS) of the made-up reviews, the prompt being their first two words."""
    split = [s.split(" ", 2) for s in sentences]
    prompts = tokens.encode(tokenizer, [f"{a} {b}" for a, b, _ in split])
    return prompts, tokens.encode_responses(tokenizer, [f" {rest}" for *_, rest in split], max_tokens=48)


@pytest.fixture(scope="session")
def _trained(tokenizer, demonstrations):
    policy = models.new_policy(tokenizer, 0, layers=1, width=32, heads=2)
    config = training.TrainConfig(steps=120, learning_rate=1e-2)
    sft.train_sft(policy, *demonstrations, tokenizer=tokenizer, config=config, batch_size=32)
    return policy


@pytest.fixture
def trained_policy(_trained):
    """A policy that writes such reviews and ends most of them; a new copy for every test."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def comparisons() -> datasets.Dataset:
    """Praise is preferred to blame: five prompts, two good and two bad responses each, four pairs of them.

    The last words of a response tell its prompt, so that no two prompts have a response in common.
    """
    rows = []
    tails = ("", " to the end", " from the start", " and too long", " again")
    for who, tail in zip(
        ("The film", "This movie", "The plot", "Her acting", "His music"), tails, strict=True
    ):
        good = [f" was {GOOD[0]}{tail}.", f" was {GOOD[1]} and {GOOD[2]}{tail}."]
        bad = [f" was {BAD[0]}{tail}.", f" was {BAD[1]} and {BAD[2]}{tail}. We left early."]
        rows += [{"prompt": who, "chosen": g, "rejected": b} for g in good for b in bad]
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="session")
def one_sentence():
    """`with one_sentence("part", ...):` a UserError that fits one line, holds each part and says what to do."""

    @contextlib.contextmanager
    def check(*parts: str):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message and "Traceback" not in message
        assert 20 < len(message) < 400, message
        assert ":" in message or ";" in message or "," in message, f"what to do is not said: {message}"
        for part in parts:
            assert part in message, message

    return check


@pytest.fixture(scope="module")
def smoke(_trained, tokenizer, sentences, tmp_path_factory):
    """The main job at a tiny scale."""
    folder, small = (
        tmp_path_factory.mktemp("models"),
        ppo.PPOConfig(rollouts=2, episodes=8, epochs=1, minibatches=2, max_tokens=12),
    )
    settings = {"epochs": 1.0, "evaluations": 1, "best_of": 4, "ppo_targets": (3.0,), "ppo": small}
    with smoke_scale(_trained, tokenizer, sentences, folder, heldout=8, **settings) as scale:
        yield scale
