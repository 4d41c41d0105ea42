"""Two processes (gloo, on the CPU) train as one does: the same curves; and one of them may be killed."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlhf_edu import losses, models, parallel, scales, tables
from rlhf_edu.__main__ import main
from rlhf_edu.ppo import PPOConfig, train_ppo
from rlhf_edu.preference import train_preference
from rlhf_edu.reward_model import train_reward_model
from rlhf_edu.sft import train_sft
from rlhf_edu.training import Memory, TrainConfig

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: Linux and macOS")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def free_port() -> int:
    """Below 32768, from where on systems hand ports out: no other test's connection is given it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def in_processes(work, folder, count: int = 2) -> list[int]:
    """work() in forks that find each other as a launcher's processes would; their exit codes."""
    port, children = free_port(), []
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= {"WORLD_SIZE": str(count), "RANK": str(number), "LOCAL_RANK": str(number)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                accelerate.PartialState._reset_state()  # TRL's, of another test in this process
                work()
                parallel.wait()
                os._exit(0)
            except BaseException:  # noqa: BLE001  of a fork nothing may come back into pytest
                (folder / f"error{number}").write_text(traceback.format_exc())
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture
def trainers(policy, tokenizer, demonstrations, comparisons):
    """name -> a function of the memory settings and more that trains a few steps and returns metrics."""
    config = TrainConfig(steps=6, learning_rate=3e-3, save_seconds=0)
    start = copy.deepcopy(policy)

    def score(prompts, responses):
        return [float(sum(r) % 7) for r in responses]

    def preference(loss, **more):
        def run(**loop):
            return train_preference(
                copy.deepcopy(start), comparisons, loss, tokenizer=tokenizer, config=config, batch_size=12, **more, **loop
            )  # fmt: skip

        return run

    def sft(**loop):
        model = copy.deepcopy(start)
        return train_sft(model, *demonstrations, tokenizer=tokenizer, config=config, batch_size=9, **loop)

    def reward_model(**loop):
        model = models.classifier_from(start, labels=1, seed=0).requires_grad_(True)
        return train_reward_model(
            model, comparisons, tokenizer=tokenizer, config=config, batch_size=12, **loop
        )

    def ppo(pretraining=None, **loop):
        settings = PPOConfig(
            rollouts=3, episodes=16, epochs=1, minibatches=2, max_tokens=8, kl_target=3.0, sample_batch=5,
            learning_rate=1e-3,
        )  # fmt: skip
        return train_ppo(
            copy.deepcopy(start), demonstrations[0][:32], score, tokenizer=tokenizer, reference=start,
            config=settings, pretraining=pretraining, **loop,
        )  # fmt: skip

    texts = [p + r for p, r in zip(*demonstrations, strict=True)][:10]
    return {
        "SFT": sft,
        "reward model": reward_model,
        "DPO": preference(losses.dpo_loss),
        "SimPO": preference(losses.simpo_loss),
        "KTO": preference(losses.kto_loss),
        "PPO": ppo,
        "PPO-ptx": lambda **loop: ppo(pretraining=texts, **loop),
    }


NAMES = ["SFT", "reward model", "DPO", "SimPO", "KTO", "PPO", "PPO-ptx"]


def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    assert list(first.columns) == list(second.columns) and len(first) == len(second) >= 6
    for column in first:
        assert np.allclose(first[column], second[column], atol=1e-4, equal_nan=True), column


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_give_the_curve_of_whole_batches(name, trainers):
    whole, cut = trainers[name](), trainers[name](memory=Memory(micro_batch=3))
    same(whole, cut)
    assert whole["loss"].std() > 1e-3  # something was learned, or any curve would do


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_curve_of_one(name, trainers, tmp_path):
    def work():
        metrics = trainers[name](folder=tmp_path / "run")
        tables.write_csv(metrics, tmp_path / "metrics.csv")  # the main process alone writes

    codes = in_processes(work, tmp_path / "errors")
    assert codes == [0, 0], [p.read_text() for p in (tmp_path / "errors").iterdir()]
    tables.write_csv(trainers[name](), tmp_path / "one.csv")
    same(pd.read_csv(tmp_path / "one.csv"), pd.read_csv(tmp_path / "metrics.csv"))


def test_the_main_job_in_two_processes(smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(
        scales.SCALES, "smoke", dataclasses.replace(smoke, ppo=dataclasses.replace(smoke.ppo, sample_batch=4))
    )

    def run(folder):
        command = ["reproduce", "--scale", "smoke", "--methods", "DPO,PPO", "--output", str(folder)]
        assert main(command) == 0

    codes = in_processes(lambda: run(tmp_path / "two"), tmp_path / "errors")
    assert codes == [0, 0], [p.read_text() for p in (tmp_path / "errors").iterdir()]
    run(tmp_path / "one")
    for name in ("frontier", "best_of_n", "margins", "lengths", "samples"):
        one, two = (pd.read_csv(tmp_path / part / f"{name}.csv") for part in ("one", "two"))
        numbers = one.select_dtypes("number").columns
        assert np.allclose(one[numbers], two[numbers], atol=1e-3, equal_nan=True), name
        pd.testing.assert_frame_equal(one.drop(columns=numbers), two.drop(columns=numbers))
    assert not list((tmp_path / "two").rglob("*.tmp")) and not list(
        (tmp_path / "two").rglob("state.safetensors")
    )


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from rlhf_edu import models, parallel, sft, tables, tokens, training
from rlhf_edu.errors import UserError
folder = Path(sys.argv[1])
tokenizer, policy = tokens.load_tokenizer(folder / "policy"), models.load_policy(folder / "policy")
data = json.loads((folder / "data.json").read_text())
def after_step(step):
    if step == 4 and parallel.rank() == 1 and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seen": float(step)}
config = training.TrainConfig(steps=7, learning_rate=3e-3, save_seconds=0)
try:
    metrics = sft.train_sft(policy, *data, tokenizer=tokenizer, config=config, batch_size=9, after_step=after_step,
                            folder=folder / "run")
    tables.write_csv(metrics, folder / "metrics.csv")
    parallel.wait()
except UserError as error:
    sys.exit(f"rlhf_edu: {error}")
"""


def test_one_process_is_killed_and_the_same_command_goes_on(policy, tokenizer, demonstrations, tmp_path):
    """Started by `accelerate launch`, as a user would."""
    models.save_model(policy, tokenizer, tmp_path / "policy")
    (tmp_path / "data.json").write_text(json.dumps(demonstrations))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / "two_processes.yaml",
    ]
    command += ["--main_process_port", "0", tmp_path / "script.py", tmp_path]

    def launch(**more):
        environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"} | more
        return subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=300
        )

    first = launch(KILL="1")
    assert first.returncode != 0 and not (tmp_path / "metrics.csv").exists()
    said = " ".join(first.stderr.split())
    assert "SIGKILL" in said or "Signal 9" in said, said[-2000:]
    said_so = "lost touch with another process" in said and "goes on from the last checkpoint" in said
    assert said_so or "closing signal SIGTERM" in said, said[-2000:]  # the launcher may be quicker
    assert (tmp_path / "run" / "state.safetensors").exists()
    second = launch()
    assert second.returncode == 0, second.stderr[-2000:]
    resumed = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "run" / "state.safetensors").unlink()
    (tmp_path / "metrics.csv").unlink()
    assert launch().returncode == 0
    assert (tmp_path / "metrics.csv").read_bytes() == resumed and resumed.count(b"\n") == 9
