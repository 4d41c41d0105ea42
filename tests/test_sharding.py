"""FSDP on two processes (gloo, on the CPU): the curves, the weights and the checkpoints of one process."""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_two_processes import CONFIGS, NAMES, SCRIPT, in_processes, same, trainers  # noqa: F401  a fixture

from rlhf_edu import lora, losses, models, scales, sharding, tables
from rlhf_edu.__main__ import main
from rlhf_edu.preference import train_preference
from rlhf_edu.sft import train_sft
from rlhf_edu.training import Memory, TrainConfig

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: Linux and macOS"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has FSDP for GPUs only"
    ),
]


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """As `accelerate launch --use_fsdp` says it; one process does not mind."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def errors(folder):
    return [p.read_text() for p in folder.iterdir()]


@pytest.mark.parametrize("name", NAMES)
def test_shares_give_the_curve_of_one_process(name, trainers, tmp_path):  # noqa: F811
    def work():
        metrics = trainers[name](memory=Memory(micro_batch=3))
        tables.write_csv(metrics, tmp_path / "metrics.csv")

    assert in_processes(work, tmp_path / "errors") == [0, 0], errors(tmp_path / "errors")
    tables.write_csv(trainers[name](), tmp_path / "one.csv")
    same(pd.read_csv(tmp_path / "one.csv"), pd.read_csv(tmp_path / "metrics.csv"))


CONFIG = TrainConfig(steps=6, learning_rate=3e-3, save_seconds=0)


def test_a_process_holds_its_share_and_at_the_end_all(policy, tokenizer, demonstrations, tmp_path):
    weights = sum(p.numel() for p in policy.parameters())
    one = copy.deepcopy(policy)
    train_sft(one, *demonstrations, tokenizer=tokenizer, config=CONFIG, batch_size=9)

    def work():
        model, seen = copy.deepcopy(policy), []
        names, identities = [n for n, _ in model.named_parameters()], [id(p) for p in model.parameters()]

        def after_step(step):
            if step == 3:
                held = sum(p.to_local().numel() for p in model.parameters())
                assert held < 0.55 * weights, (held, weights)
                assert [n for n, _ in model.named_parameters()] == names
                with sharding.whole(model):
                    seen.append(model(torch.arange(5)[None]).logits.shape)
                assert sum(p.to_local().numel() for p in model.parameters()) == held

        train_sft(
            model, *demonstrations, tokenizer=tokenizer, config=CONFIG, batch_size=9, after_step=after_step
        )
        assert seen and [id(p) for p in model.parameters()] == identities and not model.training
        assert model.lm_head.weight is model.transformer.wte.weight
        for (name, mine), expected in zip(model.named_parameters(), one.parameters(), strict=True):
            assert torch.allclose(mine, expected, atol=1e-4), name
        # it is a plain model again: it can be copied, saved and trained once more
        models.save_model(copy.deepcopy(model), tokenizer, tmp_path / "policy")
        train_sft(model, *demonstrations, tokenizer=tokenizer, config=CONFIG, batch_size=9)

    assert in_processes(work, tmp_path / "errors") == [0, 0], errors(tmp_path / "errors")
    saved = models.load_policy(tmp_path / "policy")
    assert torch.allclose(saved.lm_head.weight, one.lm_head.weight, atol=1e-4)


@pytest.mark.parametrize("first, then", [(2, 2), (2, 1), (1, 2)])
def test_a_checkpoint_is_the_same_whoever_wrote_it(first, then, policy, tokenizer, comparisons, tmp_path):
    """The run stops in the middle; one process goes on where two with shares were, and the other way about."""

    def work(stop: bool, name: str):
        def after_step(step):
            if stop and step == 4:
                raise KeyboardInterrupt

        model = copy.deepcopy(policy)
        metrics = train_preference(
            model, comparisons, losses.simpo_loss, tokenizer=tokenizer, config=CONFIG, batch_size=12,
            folder=tmp_path / "run", after_step=after_step,
        )  # fmt: skip
        tables.write_csv(metrics, tmp_path / name)

    def start(count, stop, name):
        if count == 2:
            codes = in_processes(lambda: work(stop, name), tmp_path / "errors")
            assert codes == ([1, 1] if stop else [0, 0]), errors(tmp_path / "errors")
        elif stop:
            with pytest.raises(KeyboardInterrupt):
                work(stop, name)
        else:
            work(stop, name)

    start(first, True, "none.csv")
    assert (tmp_path / "run" / "state.safetensors").exists() and not (tmp_path / "none.csv").exists()
    start(then, False, "resumed.csv")
    (tmp_path / "run" / "state.safetensors").unlink()
    start(1, False, "whole.csv")
    same(pd.read_csv(tmp_path / "whole.csv"), pd.read_csv(tmp_path / "resumed.csv"))


def test_an_adapter_and_its_reference(policy, tokenizer, comparisons, tmp_path):
    """LoRA under FSDP: the frozen weights lie in shares as well."""
    pytest.importorskip("peft")

    def train():
        model = lora.add_lora(copy.deepcopy(policy), rank=4)
        return train_preference(
            model, comparisons, losses.dpo_loss, tokenizer=tokenizer, config=dataclasses.replace(CONFIG, learning_rate=1e-2),
            batch_size=12, reference=lora.Reference(model), memory=Memory(checkpointing=True),
        )  # fmt: skip

    def work():
        tables.write_csv(train(), tmp_path / "metrics.csv")

    assert in_processes(work, tmp_path / "errors") == [0, 0], errors(tmp_path / "errors")
    tables.write_csv(train(), tmp_path / "one.csv")
    same(pd.read_csv(tmp_path / "one.csv"), pd.read_csv(tmp_path / "metrics.csv"))


def test_the_main_job_in_shares(smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(scales.SCALES, "smoke", smoke)

    def run(folder):
        assert main(["reproduce", "--scale", "smoke", "--methods", "DPO,PPO", "--output", str(folder)]) == 0

    assert in_processes(lambda: run(tmp_path / "two"), tmp_path / "errors") == [0, 0], errors(
        tmp_path / "errors"
    )
    run(tmp_path / "one")
    for name in ("frontier", "margins", "lengths"):
        one, two = (pd.read_csv(tmp_path / part / f"{name}.csv") for part in ("one", "two"))
        numbers = one.select_dtypes("number").columns
        assert np.allclose(one[numbers], two[numbers], atol=1e-3, equal_nan=True), name


def test_the_committed_configuration_is_what_the_launcher_wants(policy, tokenizer, demonstrations, tmp_path):
    """Weights are read in both processes: transformers would have left those of the second at 0."""
    models.save_model(policy, tokenizer, tmp_path / "policy")
    (tmp_path / "data.json").write_text(json.dumps(demonstrations))
    look = "config = training.TrainConfig("
    assert SCRIPT.count(look) == 1
    # each process has a file of its own: lines that two print at once can run into each other
    look_too = (
        "import os\nfrom rlhf_edu import sharding\nassert sharding.wanted()\n"
        "(folder / f'spread{os.environ[\"RANK\"]}').write_text(str(policy.lm_head.weight.std().item()))\n"
    )
    (tmp_path / "script.py").write_text(SCRIPT.replace(look, look_too + look))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "fsdp.yaml"]
    command += ["--main_process_port", "0", tmp_path / "script.py", tmp_path]
    environment = {
        k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_FSDP"
    }  # the configuration says it
    environment |= {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    spreads = [float((tmp_path / f"spread{rank}").read_text()) for rank in (0, 1)]
    assert spreads[0] == spreads[1] > 0.01, spreads
    one = train_sft(
        policy,
        *demonstrations,
        tokenizer=tokenizer,
        config=dataclasses.replace(CONFIG, steps=7),
        batch_size=9,
    )
    two = pd.read_csv(tmp_path / "metrics.csv")
    assert np.allclose(one["loss"], two["loss"].dropna(), atol=1e-4)
