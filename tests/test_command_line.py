"""`python -m rlhf_edu`: the main job from end to end at a tiny scale, interrupted and resumed; and its errors."""

import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from rlhf_edu import data, experiments, report, scales, training
from rlhf_edu.__main__ import main

TIMED = "seconds.csv"  # the one table that may differ from run to run


def run(folder, *more) -> int:
    return main(["reproduce", "--scale", "smoke", "--seed", "3", "--output", str(folder), *more])


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("outputs") / "whole"
    assert run(folder) == 0
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """For runs of which only the tables matter: drawing takes longer than all the training."""
    monkeypatch.setattr(report, "write_figures", lambda *_: [])
    monkeypatch.setattr(
        report, "write_report", lambda folder, *_: (folder / "report.html").write_text("undrawn")
    )


def tables(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.csv")) if p.name != TIMED
    }


def last_line(capsys) -> str:
    """The last line on stderr; the one and only that is not about progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "Traceback" not in "".join(lines)
    assert [line.startswith("rlhf_edu: ") for line in lines].count(True) == 1, lines
    assert lines[-1].startswith("rlhf_edu: ")
    return lines[-1]


def only_line(capsys) -> str:
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("rlhf_edu: ") and len(line) < 400
    return line


# --- end to end -------------------------------------------------------------------------------------------------


def test_everything_is_there(finished, smoke):
    for name in ("frontier", "best_of_n", "margins", "lengths", "correlations", "samples", "seconds"):
        assert len(pd.read_csv(finished / f"{name}.csv")), name
    for name in ("frontier.png", "length.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG") and (
            finished / name
        ).stat().st_size > 5000
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2 and "http://" not in page.replace(
        "http://www.w3.org", ""
    )
    assert json.loads((finished / "config.json").read_text())["seed"] == 3
    assert not list(finished.rglob("*.tmp")) and not list(finished.rglob("state.safetensors")), "left over"


def test_frontier_holds_every_run_from_its_start(finished, smoke):
    table = pd.read_csv(finished / "frontier.csv")
    sweep = experiments.sweep(smoke)
    assert set(table["run"]) == {"SFT", *(r.name for r in sweep)}
    assert {r.method for r in sweep} >= {"Preferred-FT", "Unlikelihood", "DPO", "SimPO", "PPO", "PPO-GT"}
    start = table[table["run"] == "SFT"].iloc[0]
    assert start["kl"] == 0 and start["kl_se"] == 0 and start["prompts"] == 8
    for name, curve in table[table["run"] != "SFT"].groupby("run"):
        assert curve["step"].iloc[0] == 0 and curve["reward"].iloc[0] == start["reward"], name
        assert curve["step"].is_monotonic_increasing and len(curve) == 2
        assert curve["kl"].iloc[-1] > 0 and curve["reward"].between(0, 1).all()


def test_dpo_starts_at_log_2_in_the_run_too(finished):
    loss = pd.read_csv(finished / "training" / "DPO_beta0.1.csv")["loss"].dropna()
    assert loss.iloc[0] == pytest.approx(0.693147, abs=1e-6)


def test_tables_agree_with_each_other(finished, smoke):
    completions = data.read_jsonl(
        finished / "completions.jsonl", ["prompt", "responses", "rewards", "lengths"]
    )
    assert len(completions) == 8 and {len(c["responses"]) for c in completions} == {3}
    heldout = data.read_jsonl(finished / "heldout_completions.jsonl", ["prompt", "rewards"])
    best = pd.read_csv(finished / "best_of_n.csv").set_index("n")["reward"]
    assert best.index.tolist() == [1, 2, 4]
    assert best[1] == pytest.approx(pd.DataFrame([c["rewards"] for c in heldout]).to_numpy().mean(), abs=1e-5)
    margins, lengths = (pd.read_csv(finished / f"{name}.csv") for name in ("margins", "lengths"))
    assert set(margins["method"]) == set(lengths["method"]) == {"SFT", "SimPO", "SimPO w/o LN", "DPO"}
    rho = pd.read_csv(finished / "correlations.csv").set_index("method")["rho"]
    for method, part in lengths.groupby("method"):
        expected = part["length"].corr(part["logp_per_token"], method="spearman")
        assert rho[method] == pytest.approx(expected, abs=1e-4)
        rewards, sizes = 2 * part["logp_per_token"].to_numpy(), part["length"].to_numpy()  # SimPO's, for all
        differences, longer = np.subtract.outer(rewards, rewards), np.subtract.outer(sizes, sizes)
        for pair in margins[margins["method"] == method].itertuples():
            assert np.abs(differences[longer == pair.length_difference] - pair.margin).min() < 1e-4
    assert not {c["prompt"] for c in completions} & {c["prompt"] for c in heldout}


def test_same_seed_gives_the_same_tables_twice(finished, tmp_path, undrawn):
    assert run(tmp_path / "again") == 0
    assert tables(tmp_path / "again") == tables(finished)


class Interrupts:
    """Presses Ctrl-C before update at[0], then at[1] updates later, and so on."""

    def __init__(self, monkeypatch, at: list[int]):
        self.at, self.step = list(at), 0
        monkeypatch.setattr(training, "learning_rate_at", self.rate)

    def rate(self, step, config):
        self.step += 1
        if self.at and self.step == self.at[0]:
            self.at.pop(0)
            self.step = 0
            raise KeyboardInterrupt
        return rate_of(step, config)


rate_of = training.learning_rate_at


def test_interrupted_again_and_again_it_ends_with_the_same_tables(
    finished, tmp_path, undrawn, monkeypatch, capsys
):
    folder = tmp_path / "interrupted"
    stops = [2, 4, 6, 9, 4]  # inside the reward model, supervised, DPO, PPO and length runs
    interrupts = Interrupts(monkeypatch, stops)
    for number in range(len(stops)):
        assert run(folder) == 130, number
        assert "the same command goes on from here" in last_line(capsys)
        assert (folder / "config.json").exists() and not (folder / "report.html").exists()
        states = list(folder.rglob("state.safetensors"))
        assert len(states) <= 1
    assert interrupts.at == []
    assert run(folder) == 0
    assert tables(folder) == tables(finished)
    stages = pd.read_csv(folder / TIMED)["stage"].tolist()
    assert stages == pd.read_csv(finished / TIMED)["stage"].tolist(), "a finished stage was done again"


def test_a_finished_run_is_only_drawn_again(finished, tmp_path, undrawn, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "report.html").unlink()
    Interrupts(monkeypatch, [1])  # any training step would be an interrupt
    assert run(folder) == 0
    assert (folder / "report.html").exists()
    assert tables(folder) == tables(finished)


def test_a_lost_stage_alone_is_done_again(finished, tmp_path, undrawn):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "points" / "SimPO.csv").unlink()
    assert run(folder) == 0
    assert tables(folder) == tables(finished)
    assert pd.read_csv(folder / TIMED)["stage"].tolist()[-1] == "SimPO"


def test_only_some_methods(smoke, tmp_path, undrawn):
    assert run(tmp_path / "some", "--methods", "DPO,SimPO") == 0
    table = pd.read_csv(tmp_path / "some" / "frontier.csv")
    assert set(table["method"]) == {"SFT", "DPO", "SimPO"}
    assert not (tmp_path / "some" / "reward_model").exists(), "no PPO, no reward model"


def test_prompts_of_real_reviews(smoke, sentences, tmp_path, undrawn, capsys):
    """--imdb: prompts come from the reviews of a folder; the run remembers that."""
    reviews = tmp_path / "imdb"
    reviews.mkdir()
    for split in ("train", "test"):  # both begin alike: what is held out must not be what was trained on
        rows = []
        for i in range(40):
            text = f"{10 + i} times: " + " ".join(
                sentences[(97 * i + 61 * j) % len(sentences)] for j in range(8)
            )
            rows.append({"text": text, "label": i % 2})
        data.write_jsonl(reviews / f"imdb_{split}.jsonl", rows)
    folder = tmp_path / "real"
    assert run(folder, "--imdb", str(reviews), "--methods", "SimPO") == 0
    parts = [data.read_jsonl(folder / f"{n}completions.jsonl", ["prompt"]) for n in ("", "heldout_")]
    prompts, heldout = ({c["prompt"] for c in part} for part in parts)
    texts = [r["text"] for r in data.read_jsonl(reviews / "imdb_train.jsonl", ["text"])]
    assert len(prompts) == len(heldout) == 8 and not prompts & heldout
    assert all(any(t.startswith(p + " ") for t in texts) for p in prompts)
    capsys.readouterr()
    assert run(folder, "--methods", "SimPO") == 1
    assert "other settings" in only_line(capsys)


# --- what a user can do wrong -----------------------------------------------------------------------------------


def test_unknown_scale(capsys, monkeypatch):
    assert main(["reproduce", "--scale", "huge"]) == 1
    assert "unknown scale 'huge': use one of mini, smoke, gpt2, paper" in only_line(capsys)
    monkeypatch.setenv("RLHF_EDU_SCALE", "tiny")
    assert main(["reproduce"]) == 1
    assert "unknown scale 'tiny'" in only_line(capsys)


def test_unknown_method(smoke, tmp_path, capsys):
    assert run(tmp_path / "x", "--methods", "DPO,PO") == 1
    line = only_line(capsys)
    assert "unknown method 'PO'" in line and "SimPO" in line
    assert not (tmp_path / "x").exists()


def test_unknown_stage(tmp_path, capsys):
    assert main(["build", "oven", "--output", str(tmp_path)]) == 1
    assert "unknown stage 'oven'" in only_line(capsys)


def test_hub_scale_without_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "set_threads", lambda threads=None: None)
    assert main(["reproduce", "--scale", "gpt2", "--output", str(tmp_path / "x")]) == 1
    line = only_line(capsys)
    assert "gpt2" in line and "network" in line and "git checkout" not in line


def test_missing_checkpoints(smoke, tmp_path, capsys, monkeypatch):
    lost = dataclasses.replace(smoke, oracle=str(tmp_path / "lost"))
    monkeypatch.setitem(scales.SCALES, "smoke", lost)
    assert run(tmp_path / "x") == 1
    assert str(tmp_path / "lost") in only_line(capsys)


def test_too_few_prompts(smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "shipped_prompts", lambda split: ["The film"])
    assert run(tmp_path / "x") == 1
    assert "needs 8 prompts, but there are only 1" in only_line(capsys)


def test_wrong_imdb_folder(smoke, tmp_path, capsys):
    assert run(tmp_path / "x", "--imdb", str(tmp_path / "nowhere")) == 1
    assert "no IMDb folder" in only_line(capsys)


def test_output_that_is_a_file(smoke, tmp_path, capsys):
    (tmp_path / "x").write_text("a file")
    assert run(tmp_path / "x") == 1
    assert str(tmp_path / "x") in only_line(capsys)


def test_other_settings_in_the_folder(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "copy")
    before = tables(folder)
    assert main(["reproduce", "--scale", "smoke", "--seed", "4", "--output", str(folder)]) == 1
    line = only_line(capsys)
    assert str(folder) in line and "other settings" in line and "--output" in line
    assert tables(folder) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"], ids=["empty", "cut", "noise"])
def test_damaged_configuration(finished, tmp_path, capsys, content):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "config.json").write_bytes(content)
    assert run(folder) == 1
    line = only_line(capsys)
    assert "config.json" in line and "delete" in line


TABLES = ["points/SFT.csv", "points/SimPO.csv", "points/SimPO.samples.csv", "length/SFT.lengths.csv"]


def damage(path, kind: str) -> None:
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "noise": b"\x00\xff" * 100,
        "cut": content[: content.rindex(b",") - 2],
        "other columns": b"a,b\n1,2\n",
    }
    path.write_bytes(damaged[kind])


@pytest.mark.parametrize("name", [*TABLES, "seconds.csv"])
@pytest.mark.parametrize("kind", ["empty", "noise"])
def test_damaged_tables(finished, tmp_path, undrawn, capsys, name, kind):
    """A table that was damaged on disk stops the run in one sentence that names it."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    damage(folder / name, kind)
    (folder / "length" / "length_DPO.lengths.csv").unlink()  # so that something is left to do, and to time
    assert run(folder) == 1
    line = last_line(capsys)
    assert name in line and "delete" in line


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["cut", "other columns"])
def test_damaged_tables_that_can_be_parsed(finished, tmp_path, undrawn, capsys, name, kind):
    folder = shutil.copytree(finished, tmp_path / "copy")
    damage(folder / name, kind)
    assert run(folder) == 1
    assert name in last_line(capsys)


@pytest.mark.parametrize("name", ["completions.jsonl", "heldout_completions.jsonl"])
def test_damaged_completions(finished, tmp_path, undrawn, capsys, name):
    folder = shutil.copytree(finished, tmp_path / "copy")
    for lost in ("points/SimPO.csv", "length/SFT.lengths.csv"):  # so that they are read again
        (folder / lost).unlink()
    (folder / name).write_text('{"prompt": ')
    assert run(folder) == 1
    assert f"{name}, line 1 is not JSON" in last_line(capsys)


@pytest.mark.parametrize("name, content", [("config.json", "[]"), ("reward_model/card.json", "{"), ("reward_model/card.json", "{}")])  # fmt: skip
def test_damaged_json(finished, tmp_path, undrawn, capsys, name, content):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "points" / "PPO_target3.csv").unlink()
    (folder / name).write_text(content)
    assert run(folder) == 1
    assert name in last_line(capsys)


def test_damaged_reward_model(finished, tmp_path, undrawn, capsys):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "points" / "PPO_target3.csv").unlink()
    (folder / "reward_model" / "model.safetensors").write_bytes(b"\xff" * 100)
    assert run(folder) == 1
    assert str(folder / "reward_model") in last_line(capsys)


def test_nan_in_a_loss(smoke, tmp_path, capsys, monkeypatch):
    """Numbers that overflow in training end the run at that step; what was finished is kept."""
    broken = dataclasses.replace(smoke, learning_rate=1e30)
    monkeypatch.setitem(scales.SCALES, "smoke", broken)
    folder = tmp_path / "x"
    assert run(folder, "--methods", "DPO") == 1
    line = last_line(capsys)
    assert "at step" in line and "learning rate" in line
    assert (folder / "points" / "SFT.csv").exists() and (folder / "completions.jsonl").exists()


def test_full_disk(finished, tmp_path, undrawn, capsys, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "points" / "SimPO.csv").unlink()
    before = tables(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    assert run(folder, "--methods", "SimPO") == 1
    assert "no space left" in last_line(capsys)
    assert tables(folder) == before


def test_bands(finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert main(["band", str(finished), str(other), "--output", str(tmp_path / "band")]) == 0
    table = pd.read_csv(tmp_path / "band" / "frontier.csv")
    assert len(table) == 2 * len(pd.read_csv(finished / "frontier.csv"))
    capsys.readouterr()
    assert main(["band", str(finished), str(tmp_path), "--output", str(tmp_path / "b2")]) == 1
    assert "no finished run" in only_line(capsys)
    config["scale"]["max_tokens"] += 1
    (other / "config.json").write_text(json.dumps(config))
    assert main(["band", str(finished), str(other), "--output", str(tmp_path / "b2")]) == 1
    assert "different settings" in only_line(capsys)
    assert not (tmp_path / "b2").exists()


def test_in_a_terminal_the_error_replaces_the_line_of_progress(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    assert main(["reproduce", "--scale", "huge"]) == 1
    assert sys.stderr.getvalue().startswith("\r\x1b[2Krlhf_edu: unknown scale")
