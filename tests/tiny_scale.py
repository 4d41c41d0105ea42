"""The main job made so small that a test can run all of it."""

import contextlib
import dataclasses
import functools

import pytest

from rlhf_edu import data, models, ppo, scales, training


@contextlib.contextmanager
def smoke_scale(trained, tokenizer, sentences, folder, heldout: int, **settings):
    """SCALES["smoke"] made of a tiny trained policy, a tiny oracle and its own prompts; every update leaves a checkpoint."""
    models.save_model(trained, tokenizer, folder / "sft")
    models.save_model(models.classifier_from(trained, labels=2, seed=5), tokenizer, folder / "oracle")
    prompts = sorted({" ".join(s.split()[:n]) for s in sentences for n in (2, 3, 4)})
    scale = dataclasses.replace(
        scales.SCALES["smoke"], policy=str(folder / "sft"), sft=str(folder / "sft"), oracle=str(folder / "oracle"),
        train_prompts=8, heldout_prompts=8, completions=3, max_tokens=12, pairs_a_batch=6, dpo_betas=(0.1,), **settings,
    )  # fmt: skip
    split = {"train": prompts[:8], "heldout": prompts[8 : 8 + heldout]}
    saving = functools.partial(training.TrainConfig, save_seconds=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scales.SCALES, "smoke", scale)
        patch.setattr(data, "shipped_prompts", split.get)
        patch.setattr(training, "set_threads", lambda threads=None: None)  # the tests have set theirs
        patch.setattr(training, "TrainConfig", saving)
        patch.setattr(ppo, "TrainConfig", saving)
        yield scale
