"""Trainers, samplers and notebooks on a pretend GPU (pretend_gpu.py): nothing is on the wrong device."""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_gpu import GPU, OnGPU, pretend_gpu

from rlhf_edu import build, data, evaluate, judges, logprobs, losses, models, ppo, rewards, sampling, tokens
from rlhf_edu.preference import train_preference
from rlhf_edu.reward_model import pair_accuracy, train_reward_model
from rlhf_edu.sft import heldout_loss, train_sft
from rlhf_edu.training import Memory, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIG = TrainConfig(steps=3, learning_rate=1e-4)


def world():
    """The shipped policy, its tokenizer and some comparisons, loaded anew: on whatever device there is now."""
    policy = models.load_policy(data.MINI / "sft")
    return policy, tokens.load_tokenizer(data.MINI / "sft"), data.all_pairs(data.shipped_completions()[:6])


def trained(train) -> tuple:
    """What `train` measured, and the weights that it left."""
    policy, tokenizer, comparisons = world()
    metrics = train(policy.requires_grad_(True), tokenizer, comparisons)
    return metrics[["loss", "grad_norm"]].to_numpy(), policy.lm_head.weight.detach().cpu().numpy()


def by(loss, **more):
    def train(policy, tokenizer, comparisons):
        reference = models.freeze(models.copy_of(policy))
        loop = {"tokenizer": tokenizer, "config": CONFIG, "batch_size": 12}
        return train_preference(policy, comparisons, loss, reference=reference, **loop, **more)

    return train


def sft(policy, tokenizer, comparisons):
    prompts = tokens.encode(tokenizer, comparisons["prompt"])
    responses = tokens.encode_responses(tokenizer, comparisons["chosen"], max_tokens=32)
    metrics = train_sft(policy, prompts, responses, tokenizer=tokenizer, config=CONFIG, batch_size=8)
    assert np.isfinite(heldout_loss(policy, prompts, responses, tokenizer))
    return metrics


def reward_model(policy, tokenizer, comparisons):
    model = models.classifier_from(policy, labels=1, seed=0).requires_grad_(True)
    metrics = train_reward_model(model, comparisons, tokenizer=tokenizer, config=CONFIG, batch_size=12)
    assert 0 <= pair_accuracy(model, comparisons, tokenizer) <= 1
    return metrics


TRAININGS = {
    "SFT": sft, "reward model": reward_model, "DPO": by(losses.dpo_loss), "KTO": by(losses.kto_loss),
    "R-DPO": by(losses.rdpo_loss), "ORPO": by(losses.orpo_loss), "SimPO": by(losses.simpo_loss),
    "micro-batches": by(losses.dpo_loss, memory=Memory(micro_batch=3, checkpointing=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_the_same_on_the_gpu(name):
    here = trained(TRAININGS[name])
    with pretend_gpu():
        there = trained(TRAININGS[name])
    assert len(here[0]) == CONFIG.steps and np.allclose(here[0], there[0], rtol=1e-3)
    assert np.allclose(here[1], there[1], atol=1e-4)


def test_ppo_samples_scores_and_measures_on_the_gpu():
    def train(policy, tokenizer, comparisons):
        reference = models.freeze(models.copy_of(policy))
        prompts = tokens.encode(tokenizer, sorted(set(comparisons["prompt"])))
        oracle = models.freeze(models.load_classifier(data.MINI / "oracle"))
        score = rewards.oracle_score(oracle, tokenizer)
        settings = ppo.PPOConfig(rollouts=2, episodes=6, max_tokens=8, kl_target=3.0)
        metrics = ppo.train_ppo(
            policy, prompts, score, tokenizer=tokenizer, reference=reference, config=settings
        )
        point = evaluate.evaluate_policy(
            policy, reference, prompts, score, tokenizer=tokenizer, seed=1, max_tokens=8
        )
        assert 0 <= point["reward"] <= 1 and np.isfinite(point["kl"])
        judge = judges.language_model_judge(policy, tokenizer, "{prompt} A:{first} B:{second}")
        assert judge(["The film"], [" was good."], [" was bad."]).shape == (1,)
        return metrics

    with pretend_gpu():
        metrics, _ = trained(train)
    assert len(metrics) >= 2


def test_log_probs_and_greedy_samples_are_those_of_the_cpu():
    def work():
        policy, tokenizer, comparisons = world()
        prompts = tokens.encode(tokenizer, comparisons["prompt"][:12])
        responses = tokens.encode_responses(tokenizer, comparisons["chosen"][:12], max_tokens=32)
        greedy = {"eos_id": tokenizer.eos_token_id, "max_tokens": 12, "temperature": 0.0, "seed": 0}
        return logprobs.all_logps(policy, 0, prompts, responses), sampling.sample(policy, prompts, **greedy)

    sums, texts = work()
    with pretend_gpu():
        policy, *_ = world()
        assert policy.device == GPU
        sums_there, texts_there = work()
        assert not isinstance(sums_there, OnGPU)
    assert torch.allclose(sums, sums_there, atol=1e-4) and texts == texts_there


@pytest.mark.skipif(
    not os.environ.get("RLHF_EDU_PRETEND_GPU"), reason="slow: RLHF_EDU_PRETEND_GPU=1, as .ci/run has it"
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_on_the_gpu(path):
    env = os.environ | {
        "RLHF_EDU_SCALE": "smoke",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "pretend_gpu.py", path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


# --- the pretend GPU itself -----------------------------------------------------------------------------------------


def test_devices_do_not_mix():
    with pretend_gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == GPU and there.is_cuda and (there + 1).device == GPU
        assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]  # a CPU scalar is taken along
        for wrong in (
            lambda: there + here,
            lambda: torch.stack([there, here]),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: torch.nn.functional.embedding(torch.tensor([0]), there[:, None]),
            lambda: there.index_put_((torch.tensor([0]),), here[:1]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        assert there[torch.tensor([0, 1])].device == GPU  # indices may come from the CPU
        for wrong in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="cpu"):
                wrong()
        assert there.cpu().numpy().tolist() == [1.0, 1.0, 1.0] and f"{there.sum():.1f}" == "3.0"
        there[[0, 2]] = torch.zeros(2, device="cuda")
        assert there.tolist() == [0.0, 1.0, 0.0]
    assert not torch.cuda.is_available() or torch.version.cuda


def test_gradients_and_copies_live_there():
    with pretend_gpu():
        layer = torch.nn.Linear(4, 2).to("cuda")
        twin = copy.deepcopy(layer)
        layer(torch.ones(3, 4, device="cuda")).sum().backward()
        assert layer.weight.grad.device == GPU and layer.weight.grad.tolist() == [[3.0] * 4] * 2
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
        assert not torch.equal(layer.weight.cpu(), twin.weight.cpu())
        assert isinstance(twin.weight, torch.nn.Parameter) and twin.weight.requires_grad


def test_the_oracle_is_built_on_the_gpu(tmp_path, monkeypatch):
    """Its cycles are shorter than the time between two savings, so there is no state to remove after one."""
    text = "This film was quite good and I liked the way the story was told. " * 8
    reviews = {
        part: [{"text": f"{text}{i}", "label": i % 2, "film": ""} for i in range(10)]
        for part in ("train", "unsupervised", "test")
    }
    monkeypatch.setattr(build, "whole_review_labels", lambda _: [0.5] * 10)
    monkeypatch.setattr(build, "window_teacher", lambda *_: lambda chosen, windows: np.full(len(chosen), 0.5))
    weights = []
    for device in (contextlib.nullcontext, pretend_gpu):
        folder = tmp_path / device.__name__
        folder.mkdir()
        for name in ("base", "tokenizer"):
            shutil.copytree(data.MINI / name, folder / name)
        shop = build.Workshop(folder, None, 0)
        shop.reviews = reviews
        with device():
            build.build_oracle(shop, cycles=(CONFIG, CONFIG), batch_size=4)
            weights.append(models.load_classifier(folder / "oracle").score.weight.detach().cpu().numpy())
    assert weights[0] == pytest.approx(weights[1], rel=1e-2, abs=1e-3) and np.abs(weights[0]).max() > 0.01
