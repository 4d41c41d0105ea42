"""Killed at random moments: a run that goes on afterwards ends with the same metrics CSV as one nobody disturbed.

A run is a fork of this process, killed by SIGKILL after a random time, started again, killed again, until it is done.
RLHF_EDU_FAULTS=20 repeats each of them 20 times (a few minutes); without it there are two.
"""

import copy
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch
import transformers

from rlhf_edu import data, labelling, models, report, tables, training
from rlhf_edu.__main__ import main
from rlhf_edu.ppo import PPOConfig, train_ppo
from rlhf_edu.preference import train_preference
from rlhf_edu.reward_model import train_reward_model
from rlhf_edu.sft import train_sft
from rlhf_edu.training import TrainConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL: Linux and macOS")
TIMES = int(os.environ.get("RLHF_EDU_FAULTS") or 2)


def fork(work, log, *, kill_after: float | None = None) -> bool:
    """Run `work` in a fork; False if it was killed before it was done. What it raised is raised here."""
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  of a fork nothing may come back into pytest
            log.write_text(traceback.format_exc())
            os._exit(1)
    end = time.monotonic() + (math.inf if kill_after is None else kill_after)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == 0 and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            pid, status = os.waitpid(child, 0)
        if pid:
            break
        time.sleep(0.002)
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), log.read_text()
    return os.WIFEXITED(status)


class Kills:
    """Kills that struck, and those among them that left a checkpoint to go on from; `seconds` is what a run takes."""

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds, self.chance = name, seconds, random.Random(name)
        self.struck = self.midway = 0

    def strikes(self, work, folder, log, early: float, late: float) -> bool:
        """Start `work`, to be killed between these shares of its time; False if it was done before."""
        began = time.monotonic()
        if fork(lambda: work(folder), log, kill_after=self.seconds * self.chance.uniform(early, late)):
            self.seconds = min(self.seconds, time.monotonic() - began)
            return False
        self.struck += 1
        self.midway += any(folder.rglob("state.safetensors")) if folder.exists() else 0
        return True

    def until_done(self, work, folder, log, number: int) -> None:
        """Start `work` again and again, each time killed at a random moment, at last left alone.

        The first moments of the repetitions lie spread over a whole run, and strike; the later ones anywhere.
        """
        for _ in range(20):  # a machine that was busier when it was measured is quicker now
            if self.strikes(work, folder, log, number / TIMES, (number + 1) / TIMES):
                break
            shutil.rmtree(folder)
        for _ in range(5):
            if not self.strikes(work, folder, log, 0, 1):
                return
        fork(lambda: work(folder), log)

    def told(self) -> None:
        print(f"{self.name}: {TIMES} repetitions, {self.struck} kills, {self.midway} of them midway")
        assert self.struck >= TIMES, "some runs were over before they could be killed"
        assert self.midway >= TIMES / 4 or TIMES < 20, "few kills left a checkpoint: the runs are too short"


@pytest.fixture
def trainers(policy, tokenizer, demonstrations, comparisons):
    """name -> a function of the folder that trains a few steps, saves after each, and returns metrics."""
    prompts = demonstrations[0][:16]
    config = TrainConfig(steps=40, learning_rate=1e-3, save_seconds=0)

    def score(prompts, responses):
        return [float(len(r) % 5) for r in responses]

    def loop(folder):
        return {"tokenizer": tokenizer, "folder": folder}

    def sft(folder):
        return train_sft(copy.deepcopy(policy), *demonstrations, config=config, batch_size=8, **loop(folder))

    def reward_model(folder):
        model = models.classifier_from(policy, labels=1, seed=0).requires_grad_(True)
        return train_reward_model(model, comparisons, config=config, batch_size=8, **loop(folder))

    def dpo(folder):
        return train_preference(
            copy.deepcopy(policy), comparisons, config=config, batch_size=8, **loop(folder)
        )

    def ppo(folder):
        settings = PPOConfig(rollouts=4, episodes=8, epochs=1, minibatches=2, max_tokens=8, kl_target=3.0)
        return train_ppo(
            copy.deepcopy(policy), prompts, score, reference=policy, config=settings, **loop(folder)
        )

    return {"SFT": sft, "reward model": reward_model, "PPO": ppo, "DPO": dpo}


@pytest.mark.parametrize("name", ["SFT", "reward model", "PPO", "DPO"])
def test_killed_runs_end_with_the_same_metrics(name, trainers, tmp_path, monkeypatch):
    saving = training.TrainConfig
    monkeypatch.setattr("rlhf_edu.ppo.TrainConfig", lambda **k: saving(**k, save_seconds=0))

    def work(folder):
        metrics = trainers[name](folder)
        time.sleep(0.01)  # a kill may fall between the end and the table
        tables.write_csv(metrics, folder / "metrics.csv")

    began = time.monotonic()
    fork(lambda: work(tmp_path / "whole"), tmp_path / "log")
    seconds, expected = time.monotonic() - began, (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert expected.count(b"\n") >= 8
    kills = Kills(name, seconds)
    for number in range(TIMES):
        folder = tmp_path / str(number)
        kills.until_done(work, folder, tmp_path / "log", number)
        assert (folder / "metrics.csv").read_bytes() == expected, f"repetition {number}"
    kills.told()


def test_a_killed_main_job_ends_with_the_same_tables(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_figures", lambda *_: [])  # drawing takes longer than all the training
    monkeypatch.setattr(
        report, "write_report", lambda folder, *_: (folder / "report.html").write_text("undrawn")
    )

    def work(folder):
        assert main(["reproduce", "--scale", "smoke", "--seed", "3", "--output", str(folder)]) == 0

    def found(folder):
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in folder.rglob("*.csv")
            if p.name != "seconds.csv"
        }

    began = time.monotonic()
    fork(lambda: work(tmp_path / "whole"), tmp_path / "log")
    seconds, expected = time.monotonic() - began, found(tmp_path / "whole")
    kills = Kills("main job", seconds)
    for number in range(TIMES):
        folder = tmp_path / str(number)
        kills.until_done(work, folder, tmp_path / "log", number)
        assert found(folder) == expected, f"repetition {number}"
    kills.told()


# --- two at once ------------------------------------------------------------------------------------------------


def test_the_second_process_on_a_folder_says_so_and_stops(trainers, tmp_path, one_sentence):
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with training.only_one(tmp_path):
            os.write(ready[1], b"x")
            os.read(go_on[0], 1)
            os._exit(0)
    os.read(ready[0], 1)
    try:
        with one_sentence("another process", str(tmp_path), "wait"):
            trainers["DPO"](tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(trainers["DPO"](tmp_path)) == 40  # the killed one holds nothing


def test_the_second_main_job_says_so_and_stops(smoke, tmp_path, capsys):
    with training.only_one(tmp_path):
        assert main(["reproduce", "--scale", "smoke", "--output", str(tmp_path)]) == 1
    assert "another process is working in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- a full disk, a file cut short ------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """From the call on, the system refuses what makes a file larger than so many bytes, as a full disk does."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_earlier_file(policy, tokenizer, tmp_path, one_sentence, full_disk):
    rows = [{"a": "x" * 1000}] * 40
    writers = {
        "table.csv": lambda path: tables.write_csv(training.pd.DataFrame(rows), path),
        "value.json": lambda path: tables.write_json(rows, path),
        "rows.jsonl": lambda path: data.write_jsonl(path, rows),
        "model": lambda path: models.save_model(policy, tokenizer, path),
    }
    for name in writers:
        (tmp_path / name).mkdir() if name == "model" else (tmp_path / name).write_text("earlier")
    (tmp_path / "model" / "config.json").write_text("earlier")
    full_disk(10_000)
    for name, write in writers.items():
        with one_sentence(name, "untouched"):
            write(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(writers), "a part of a file was left behind"
    assert (tmp_path / "model" / "config.json").read_text() == "earlier"
    assert all((tmp_path / n).read_text() == "earlier" for n in writers if n != "model")


PAIRS = [labelling.Pair("p", f"a{i}", f"b{i}") for i in range(400)]


def test_labels_on_a_full_disk_and_in_a_truncated_file(tmp_path, one_sentence, full_disk):
    file = labelling.LabelFile(tmp_path / "me.jsonl", PAIRS)
    full_disk(1000)
    kept = 0
    with one_sentence("me.jsonl", "earlier ones are untouched"):
        for kept, pair in enumerate(PAIRS):
            file.record(pair, "first")
    assert kept > 3 and file.labels()[:kept] == ["first"] * kept and not any(file.labels()[kept:])
    whole = file.path.read_bytes()
    for size in range(0, len(whole), 37):  # the machine lost power: any part of the file may be gone
        file.path.write_bytes(whole[:size])
        done = whole[:size].count(b"\n")
        labels = file.labels()
        assert labels[:done] == ["first"] * done and not any(labels[done + 1 :])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of so many kilobytes; called again, it gets that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(kilobytes: int):
        option = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kilobytes}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"a small disk needs Linux and its mount command: {error}")
        if done.returncode:
            pytest.skip(f"a small disk needs root, who may mount a tmpfs: {done.stderr.strip()}")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["SFT", "reward model", "PPO", "DPO"])
def test_a_disk_that_fills_up_costs_no_checkpoint(
    name, trainers, tmp_path, small_disk, one_sentence, monkeypatch
):
    saving = training.TrainConfig
    monkeypatch.setattr("rlhf_edu.ppo.TrainConfig", lambda **k: saving(**k, save_seconds=0))
    expected = trainers[name](tmp_path / "whole")
    size = (tmp_path / "whole" / "state.safetensors").stat().st_size
    disk = small_disk(int(1.5 * size / 1024) + 8)  # room for one checkpoint, not for its successor beside it
    with one_sentence("state.safetensors", "no space left on the disk", "free some space"):
        trainers[name](disk)
    assert [p.name for p in disk.iterdir()] == ["state.safetensors"], "a part of a file was left behind"
    small_disk(10 * size // 1024)  # somebody made room
    began = int(training.safe_open(disk / "state.safetensors", framework="pt").metadata()["step"])
    assert 0 < began < len(expected) - 1
    assert trainers[name](disk).equals(expected)


def test_labels_on_a_disk_that_fills_up(small_disk, one_sentence):
    disk = small_disk(8)
    file = labelling.LabelFile(disk / "labels" / "me.jsonl", PAIRS)
    kept = 0
    with one_sentence("me.jsonl", "no space left on the disk", "earlier ones are untouched"):
        for kept, pair in enumerate(PAIRS):
            file.record(pair, "first")
    assert kept > 3 and file.labels()[:kept] == ["first"] * kept
    small_disk(64)
    assert file.next() in PAIRS[kept : kept + 2]  # half a line may be left of the one that was refused
    file.record(PAIRS[kept + 1], "second")
    assert file.labels()[:kept] == ["first"] * kept and file.labels()[kept + 1] == "second"


def test_truncated_checkpoints_tables_and_models(trainers, policy, tokenizer, tmp_path, one_sentence):
    expected = trainers["DPO"](tmp_path / "run")
    state = tmp_path / "run" / "state.safetensors"
    whole = state.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        state.write_bytes(whole[:size])
        with one_sentence("state.safetensors", "delete this file to start this run afresh"):
            trainers["DPO"](tmp_path / "run")
        assert state.stat().st_size == size
    state.unlink()
    assert trainers["DPO"](tmp_path / "run").equals(expected)
    path = tmp_path / "metrics.csv"
    tables.write_csv(expected, path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:size].rstrip(b"\n"))  # at a line's end nothing would be seen to be missing
        with one_sentence("metrics.csv", "delete it"):
            tables.read_csv(path, ["step", "loss"])
    models.save_model(policy, tokenizer, tmp_path / "model")
    for name, load in (("model.safetensors", models.load_policy), ("config.json", models.load_policy)):
        path = tmp_path / "model" / name
        whole = path.read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:size])
            with one_sentence(str(tmp_path / "model"), "restore the folder or train it again"):
                load(tmp_path / "model")
        path.write_bytes(whole)
    models.load_policy(tmp_path / "model")


# --- losses that are no numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_step_batch_and_advice(
    policy, tokenizer, comparisons, one_sentence, poison
):
    calls = []

    def broken(chosen_logps, rejected_logps):
        calls.append(1)
        loss = rejected_logps - chosen_logps
        return loss * poison if len(calls) == 3 else loss

    config = TrainConfig(steps=5, learning_rate=1e-3, seed=4)
    with one_sentence("step 3 of 5", "batch, number 2 of seed 4", "lower the learning rate (now 0.001)"):
        train_preference(policy, comparisons, broken, tokenizer=tokenizer, config=config, batch_size=8)
    assert all(torch.isfinite(p).all() for p in policy.parameters())


# --- a GPU's memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SFT", "reward model", "PPO", "DPO"])
def test_out_of_memory_names_the_batch_size_to_try(name, trainers, one_sentence, monkeypatch):
    forward = transformers.GPT2Model.forward

    def full(*args, **kwargs):  # a pass for the gradient does not fit; sampling and reference log-probs did
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformers.GPT2Model, "forward", full)
    advice = "--micro-batch 2" if name == "PPO" else "--micro-batch 4"
    with one_sentence("GPU's memory", "rows at once", advice):
        trainers[name](None)


def test_out_of_memory_of_a_single_row_says_what_else_there_is(one_sentence):
    with one_sentence("too small for this model", "LoRA"), training.enough_memory(["one row"]):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_out_of_memory_while_sampling_names_the_batch_to_try(trainers, one_sentence, monkeypatch):
    forward = transformers.GPT2Model.forward

    def full(*args, **kwargs):
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformers.GPT2Model, "forward", full)
    with one_sentence("GPU's memory", "rows at once", "PPOConfig.sample_batch"):
        trainers["PPO"](None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["SFT", "reward model", "PPO", "DPO"])
def test_a_loss_that_is_no_number_stops_every_trainer(name, value, trainers, one_sentence, monkeypatch):
    forward, passes = transformers.GPT2Model.forward, []

    def spoilt(*args, **kwargs):
        out = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            passes.append(1)
            if len(passes) > 1:  # the first update is sound
                out.last_hidden_state = out.last_hidden_state * value
        return out

    monkeypatch.setattr(transformers.GPT2Model, "forward", spoilt)
    with one_sentence("the loss became", "at step 2 of", "lower the learning rate", "number 1 of seed"):
        trainers[name](None)
