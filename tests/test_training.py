"""The loop under all trainers: the same as a plain one, resumable to the last bit, and clear when it fails."""

import copy
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlhf_edu import training
from rlhf_edu.errors import explained
from rlhf_edu.sft import train_sft
from rlhf_edu.training import TrainConfig, epoch_order, learning_rate_at, rng, torch_rng, train

STATE = "state.safetensors"


def line_model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


def batch_of(step: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch_rng(0, step))


def run(model, config, *, stop_at=None, poison=None, **loop):
    """Fit sin(sum of x); KeyboardInterrupt instead of batch `stop_at`, NaN in the loss of batch `poison`."""
    seen = []

    def batch(step):
        if step == stop_at:
            raise KeyboardInterrupt
        seen.append(step)
        return step, batch_of(step)

    def loss_of(numbered):
        step, x = numbered
        loss = ((model(x)[:, 0] - x.sum(1).sin()) ** 2).mean()
        if "state" in loop:
            loop["state"]["coefficient"] *= 1.1
        extra = {"x": x.mean(), **(loop.get("state") or {})}
        return (loss * math.nan if step == poison else loss), extra

    return train(model, batch, loss_of, config, **loop), seen


# --- what a step does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, rates",
    [  # 10 steps, 2 of them warm-up, a tenth left: a cosine from 1 to .1 is .1 + .9 (1 + cos) / 2
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 6: 0.55}),
        ("linear", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.775, 6: 0.55, 9: 0.1 + 0.9 / 8}),
        ("constant", {0: 0.5, 1: 1.0, 2: 1.0, 9: 1.0}),
    ],
)
def test_learning_rate_by_hand(schedule, rates):
    config = TrainConfig(steps=10, learning_rate=2.0, warmup=0.2, schedule=schedule, final=0.1)
    for step, share in rates.items():
        assert learning_rate_at(step, config) == pytest.approx(2.0 * share), step


def test_no_warmup_and_part_steps_of_it():
    assert learning_rate_at(0, TrainConfig(steps=10, learning_rate=1.0, warmup=0.0)) == 1.0
    rates = [learning_rate_at(s, TrainConfig(steps=10, learning_rate=1.0, warmup=0.25)) for s in range(4)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])  # 2.5 steps of warm-up are 3


def test_unknown_schedule_is_explained_at_the_first_step(one_sentence):
    with one_sentence("unknown schedule 'cosin'", "cosine", "linear", "constant"):
        learning_rate_at(0, TrainConfig(steps=10, learning_rate=1.0, schedule="cosin"))


def test_equals_a_plain_loop():
    """AdamW, schedule and clipping, written out; clipping bites, or the test could not tell."""
    config = TrainConfig(steps=8, learning_rate=0.05, weight_decay=0.1, max_grad_norm=0.5)
    model, plain = line_model(), line_model()
    metrics, _ = run(model, config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms = [], []
    for step in range(8):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
        x = batch_of(step)
        loss = ((plain(x)[:, 0] - x.sum(1).sin()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in plain.parameters()))
        for p in plain.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    assert metrics["loss"].tolist() == pytest.approx(losses, abs=1e-5)
    assert metrics["grad_norm"].tolist() == pytest.approx(norms, rel=1e-4)
    assert metrics["step"].tolist() == list(range(1, 9))
    assert max(norms) > 0.5
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_metrics_do_not_depend_on_how_often_they_are_read():
    often, _ = run(line_model(), TrainConfig(steps=7, learning_rate=0.01))
    seldom, _ = run(line_model(), TrainConfig(steps=7, learning_rate=0.01, log_every=3))
    pd.testing.assert_frame_equal(often, seldom, check_exact=True)


def test_after_step_sees_the_start_and_adds_to_its_row():
    calls, told = [], []

    def after_step(step):
        calls.append(step)
        return {"eval": 10.0 * step} if step % 2 == 0 else None

    config = TrainConfig(steps=4, learning_rate=0.01, log_every=4)
    metrics, _ = run(
        line_model(), config, after_step=after_step, progress=lambda share, note: told.append(share)
    )
    assert calls == [0, 1, 2, 3, 4]
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert metrics["step"].tolist() == [0, 1, 2, 3, 4]
    assert metrics["eval"].dropna().tolist() == [0.0, 20.0, 40.0]
    assert metrics["loss"].isna().tolist() == [True, False, False, False, False]


def test_frozen_model_is_explained(one_sentence):
    with one_sentence("frozen", "requires_grad_"):
        run(line_model().requires_grad_(False), TrainConfig(steps=1, learning_rate=0.1))


# --- order of the data ------------------------------------------------------------------------------------------


def test_an_epoch_visits_everything_once_and_is_reshuffled():
    epochs = [np.concatenate([epoch_order(12, 4, 3 * e + i, seed=5) for i in range(3)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not any((epoch == np.arange(12)).all() for epoch in epochs)


def test_part_batches_are_dropped_and_small_data_is_one_batch():
    epoch = np.concatenate([epoch_order(11, 4, i, seed=0) for i in range(2)])
    assert len(set(epoch)) == 8
    assert sorted(epoch_order(3, 10, 7, seed=0)) == [0, 1, 2]


def test_order_depends_on_the_seed_alone():
    expected = epoch_order(50, 10, 7, seed=1)
    np.random.seed(3)
    torch.manual_seed(3)
    epoch_order(50, 10, 2, seed=9)
    assert (epoch_order(50, 10, 7, seed=1) == expected).all()
    assert (epoch_order(50, 10, 7, seed=2) != expected).any()
    assert rng(0, 1, 2).random() == rng(0, 1, 2).random() != rng(0, 2, 1).random()


def test_no_data_is_explained(one_sentence):
    with one_sentence("empty"):
        epoch_order(0, 4, 0, seed=0)


# --- interruption -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, log_every):
    config = TrainConfig(steps=12, learning_rate=0.05, weight_decay=0.1, save_seconds=0, log_every=log_every)

    def loop():
        return {
            "state": {"coefficient": 0.5},
            "after_step": lambda s: {"eval": s / 3} if s % 5 == 0 else None,
        }

    whole_model = line_model()
    whole, _ = run(whole_model, config, **loop())
    for stop in (5, 6, 11):  # each time from a fresh process, as far as the loop can tell
        with pytest.raises(KeyboardInterrupt):
            run(line_model(), config, folder=tmp_path, stop_at=stop, **loop())
    model, state = line_model(), {"coefficient": 0.5}
    resumed, seen = run(model, config, folder=tmp_path, **{**loop(), "state": state})
    assert seen == [11], "it did not go on where it stopped"
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    assert state["coefficient"] == pytest.approx(0.5 * 1.1**12)
    for p, q in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_trainer_resumes_too(policy, tokenizer, demonstrations, tmp_path):
    """SFT of a real (tied-weight) model, its data order included."""
    config = TrainConfig(steps=4, learning_rate=1e-3, save_seconds=0)
    rest = {"tokenizer": tokenizer, "config": config, "batch_size": 8}
    whole_policy, broken = copy.deepcopy(policy), copy.deepcopy(policy)
    whole = train_sft(whole_policy, *demonstrations, **rest)

    def interrupt(share, note):
        if share == 0.75:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(broken, *demonstrations, folder=tmp_path, progress=interrupt, **rest)
    assert (tmp_path / STATE).exists()
    resumed = train_sft(policy, *demonstrations, folder=tmp_path, **rest)
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    for p, q in zip(policy.parameters(), whole_policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_saves_only_after_whole_rollouts_and_not_at_the_end(tmp_path):
    steps_saved = []

    def look(share, note):
        if (tmp_path / STATE).exists():
            steps_saved.append(len(load_metadata(tmp_path / STATE)["rows"]))

    config = TrainConfig(steps=9, learning_rate=0.01, save_seconds=0)
    run(line_model(), config, folder=tmp_path, save_multiple=3, progress=look)
    assert sorted(set(steps_saved)) == [3, 6]


def load_metadata(path):
    with safe_open(path, framework="pt") as file:
        return {k: json.loads(v) for k, v in file.metadata().items()}


# --- failures ---------------------------------------------------------------------------------------------------


def test_nan_loss_names_the_step_and_spoils_nothing(tmp_path, one_sentence):
    model, config = line_model(), TrainConfig(steps=8, learning_rate=0.05, save_seconds=0, log_every=4)
    with one_sentence("nan", "step 6 of 8", "0.05", "learning rate"):
        run(model, config, folder=tmp_path, poison=5)
    good, _ = run(line_model(), TrainConfig(steps=8, learning_rate=0.05), poison=None)
    weights = load_file(tmp_path / STATE)
    assert load_metadata(tmp_path / STATE)["step"] == 5
    assert all(t.isfinite().all() for t in weights.values())
    assert all(p.isfinite().all() for p in model.parameters())
    rows = load_metadata(tmp_path / STATE)["rows"]
    assert [row["loss"] for row in rows] == pytest.approx(good["loss"].tolist()[:5])


def test_nan_gradient_of_a_finite_loss_is_found_as_well(one_sentence):
    """sqrt at 0: the loss is 0, its gradient is not a number."""
    model = line_model()
    before = [p.clone() for p in model.parameters()]

    def loss_of(x):
        out = model(x).sum()
        return torch.sqrt(out - out), {}

    with one_sentence("gradient norm", "step 1 of 2"):
        train(model, batch_of, loss_of, TrainConfig(steps=2, learning_rate=0.1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def interrupted(folder, config):
    with pytest.raises(KeyboardInterrupt):
        run(line_model(), config, folder=folder, stop_at=2)
    return (folder / STATE).read_bytes()


CONFIG = TrainConfig(steps=4, learning_rate=0.05, save_seconds=0)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_damaged_state_is_explained(tmp_path, one_sentence, damage):
    content, path = interrupted(tmp_path, CONFIG), tmp_path / STATE
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff" * 200}[damage])
    with one_sentence(str(path), "delete this file"):
        run(line_model(), CONFIG, folder=tmp_path)


@pytest.mark.parametrize("outputs", [1, 2])
def test_state_of_another_model_is_refused(tmp_path, one_sentence, outputs):
    """One output of the saved model would even spread over two by broadcasting."""
    interrupted(tmp_path, CONFIG)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs))
    other.append(torch.nn.Linear(outputs, 1) if outputs == 1 else torch.nn.Identity())
    with one_sentence(str(tmp_path / STATE), "delete"):
        run(other, CONFIG, folder=tmp_path)


@pytest.mark.parametrize("other", [{"learning_rate": 0.1}, {"steps": 5}, {"seed": 1}])
def test_state_of_other_settings_is_refused_and_kept(tmp_path, one_sentence, other):
    content = interrupted(tmp_path, CONFIG)
    with one_sentence(str(tmp_path / STATE), "other settings", "delete"):
        run(line_model(), dataclasses.replace(CONFIG, **other), folder=tmp_path)
    with one_sentence("other settings"):
        run(line_model(), CONFIG, folder=tmp_path, fingerprint={"run": "another"})
    assert (tmp_path / STATE).read_bytes() == content


def test_no_space_left_is_explained_and_the_earlier_file_intact(tmp_path, one_sentence, monkeypatch):
    content = interrupted(tmp_path, CONFIG)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    with one_sentence(str(tmp_path / STATE), "no space left", "earlier results are untouched"):
        run(line_model(), CONFIG, folder=tmp_path)
    assert (tmp_path / STATE).read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [STATE], "a part of a file was left behind"


def test_a_write_that_really_fails_is_explained(tmp_path, one_sentence):
    """The system refuses files beyond 20 kB, as a full disk would."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    wide = torch.nn.Sequential(torch.nn.Linear(3, 2000), torch.nn.Tanh(), torch.nn.Linear(2000, 1))
    with pytest.raises(KeyboardInterrupt):
        run(wide, CONFIG, folder=tmp_path, stop_at=2)
    content = (tmp_path / STATE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with one_sentence("saving", str(tmp_path / STATE), "untouched"):
            run(wide, CONFIG, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / STATE).read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [STATE], "a part of a file was left behind"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left (os error 28)")]
)
def test_no_space_left_in_the_words_of_python_and_of_safetensors(error, one_sentence):
    with (
        one_sentence("saving x failed (no space left on the disk); free some"),
        explained("saving x", "free some"),
    ):
        raise error


def test_folder_that_cannot_be_made_is_explained(tmp_path, one_sentence):
    (tmp_path / "file").write_text("in the way")
    with one_sentence("saving", str(tmp_path / "file")):
        run(line_model(), CONFIG, folder=tmp_path / "file" / "run")


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "table.csv"
    with training.replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(ZeroDivisionError), training.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


# --- watching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_watcher_is_given_every_complete_row_once_and_cannot_change_it(log_every):
    config, rows = dataclasses.replace(CONFIG, log_every=log_every), []

    def watch(row):
        rows.append(dict(row))
        row.clear()

    extra = lambda step: {"reward": float(step)} if step % 4 == 0 else None
    metrics, _ = run(line_model(), config, watch=watch, after_step=extra)
    pd.testing.assert_frame_equal(pd.DataFrame(rows), metrics)
    assert [r["step"] for r in rows] == list(range(config.steps + 1))
    pd.testing.assert_frame_equal(metrics, run(line_model(), config, after_step=extra)[0])


def test_a_watcher_of_a_resumed_run_sees_the_rows_from_before(tmp_path):
    interrupted(tmp_path, CONFIG)
    rows = []
    metrics, _ = run(line_model(), CONFIG, folder=tmp_path, watch=rows.append)
    pd.testing.assert_frame_equal(pd.DataFrame(rows), metrics)
