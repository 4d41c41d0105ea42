"""`python -m rlhf_edu zoo` from end to end, interrupted and resumed; and that nobody trains on held-out prompts."""

import functools
import shutil

import pandas as pd
import pytest
from test_command_line import Interrupts
from tiny_scale import smoke_scale

from rlhf_edu import data, experiments, tables, zoo
from rlhf_edu.__main__ import main
from rlhf_edu.ppo import PPOConfig


@pytest.fixture(scope="module")
def smoke(_trained, tokenizer, sentences, tmp_path_factory):
    """With more held-out prompts than the main job's, since some of them tune."""
    folder, small = (
        tmp_path_factory.mktemp("models"),
        PPOConfig(rollouts=1, episodes=4, epochs=1, minibatches=1, max_tokens=12),
    )
    with smoke_scale(_trained, tokenizer, sentences, folder, heldout=12, ppo=small) as scale:
        yield scale


def run(folder, *more) -> int:
    return main(["zoo", "--scale", "smoke", "--output", str(folder), "--threads", "1", *map(str, more)])


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    """Two seeds that nothing disturbed: one that tuned, one that took its settings."""
    folder = tmp_path_factory.mktemp("outputs")
    assert run(folder / "0", "--seed", 0) == 0
    assert run(folder / "1", "--seed", 1, "--tuned", folder / "0") == 0
    return folder


def table(folder) -> pd.DataFrame:
    return tables.read_csv(folder / "zoo.csv", tables.COLUMNS["zoo"].split())


def test_every_method_has_three_settings_and_one_result(finished, smoke):
    both = table(finished / "0")
    tuning, test = both[both["stage"] == "tuning"], both[both["stage"] == "test"].set_index("method")
    assert tuning["run"].tolist() == [r.name for r in zoo.grid()]
    assert tuning.groupby("method").size().eq(3).all() and tuning["method"].nunique() == 11
    assert set(test.index) == {"SFT", *zoo.GRID}
    assert set(test["run"][1:]) == set(tuning.loc[tuning["chosen"] == 1, "run"]) == set(zoo.choose(tuning))
    assert tuning["prompts"].eq(4).all() and test["prompts"].eq(8).all()
    assert tuning["steps"].eq(2).all() and (tuning["seconds_a_step"] > 0).all()
    assert test["win"].between(0, 100).all() and both["accuracy"].between(0, 1).all()
    assert test.loc["SFT", "kl"] == 0 and test.loc["SFT", "accuracy_h"] == 0.5
    assert (test["kl"].drop("SFT") > 0).all()
    texts = pd.read_csv(finished / "0" / "samples.csv")
    assert set(texts["run"]) == set(test["run"])
    left = [p for p in (finished / "0").rglob("*") if p.name in ("policies", "state.safetensors")]
    assert not left, "left over"


def test_other_seeds_take_the_settings_and_band_gathers_all(finished, tmp_path, one_sentence):
    first, second = table(finished / "0"), table(finished / "1")
    assert second["run"].tolist() == first.loc[first["stage"] == "test", "run"].tolist()
    assert not second["win"].equals(first.loc[first["stage"] == "test", "win"])
    folders = [finished / "0", finished / "1"]
    assert main(["band", *map(str, folders), "--output", str(tmp_path / "both")]) == 0
    gathered = pd.read_csv(tmp_path / "both" / "zoo.csv")
    assert gathered.groupby("method")["seed"].nunique().eq(2).all() and gathered["stage"].eq("test").all()
    assert len(pd.read_csv(tmp_path / "both" / "tuning.csv")) == 33
    with one_sentence("--tuned"):
        zoo.gather([finished / "0", finished / "0"], tmp_path / "twice")
    with one_sentence("--tuned"):
        zoo.gather([finished / "1"], tmp_path / "untuned")


def test_interrupted_it_goes_on_and_ends_with_the_same_table(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "interrupted"
    stops = [2, 12, 31]  # in the first setting, at a first and at a second update later on
    interrupts = Interrupts(monkeypatch, stops)
    for _ in range(len(stops)):
        assert run(folder, "--seed", 0) == 130
        assert "the same command goes on from here" in capsys.readouterr().err
        assert not (folder / "zoo.csv").exists()
    assert interrupts.at == []
    assert run(folder, "--seed", 0) == 0
    seconds = ["seconds_a_step"]
    pd.testing.assert_frame_equal(
        table(folder).drop(columns=seconds), table(finished / "0").drop(columns=seconds)
    )
    whole, parts = (pd.read_csv(f / "seconds.csv")["stage"].tolist() for f in (finished / "0", folder))
    assert whole == parts, "a finished stage was done again"


def test_a_folder_of_other_settings_is_refused(finished, tmp_path, capsys):
    folder = shutil.copytree(finished / "0", tmp_path / "copy")
    assert run(folder, "--seed", 0, "--tuned", finished / "0") == 1
    assert "other settings" in capsys.readouterr().err
    assert run(tmp_path / "new", "--tuned", finished / "1") == 1
    assert "tuned setting" in capsys.readouterr().err


def test_choice_wins_most_within_the_limit_and_else_stays_nearest():
    far = zoo.KL_LIMIT + 1
    tuning = pd.DataFrame(
        [("a", "a1", 60, 3), ("a", "a2", 90, far), ("a", "a3", 70, 14), ("b", "b1", 90, far + 9), ("b", "b2", 40, far)],
        columns=["method", "run", "win", "kl"],
    )  # fmt: skip
    assert zoo.choose(tuning) == ["a3", "b2"]


# --- held-out prompts and comparisons are never trained on -------------------------------------------------------


def test_no_shipped_training_file_holds_a_heldout_prompt():
    heldout = {r["prompt"] for r in data.read_jsonl(data.DATA / "prompts_heldout.jsonl", ["prompt"])}
    assert len(heldout) == 512
    for name in ("prompts_train", "completions", "demonstrations"):
        assert not heldout & {
            r["prompt"] for r in data.read_jsonl(data.DATA / f"{name}.jsonl", ["prompt"])
        }, name


class Recorded(Exception):
    pass


def trained_on(monkeypatch, work) -> set[tuple[int, ...]]:
    """Token ids of all prompts that `work` hands to a trainer; none of them trains."""
    found = set()

    def trainer(model, what, *_, **__):
        found.update(map(tuple, what if isinstance(what, list) else what.prompts))
        raise Recorded

    for module in (experiments, zoo):
        for name in ("train_preference", "train_reward_model", "train_ppo"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, trainer)
    with pytest.raises(Recorded):
        work()
    return found


def test_main_job_trains_on_no_heldout_prompt(smoke, tmp_path, monkeypatch):
    job = experiments.Job(smoke, 0, tmp_path, None, None)
    job.load()
    job.comparisons()
    job.make_completions(
        tmp_path / "heldout_completions.jsonl", job.heldout_texts, job.heldout_prompts, 4, 67
    )
    monkeypatch.setattr(job, "ppo_score", lambda method: None)
    monkeypatch.setattr(job, "evaluator", lambda *_: None)
    heldout = set(map(tuple, job.heldout_prompts))
    pieces = [job.train_rewards]
    pieces += [functools.partial(job.train_run, r) for r in job.runs]
    pieces += [functools.partial(job.train_length_run, r) for r in experiments.LENGTH_RUNS]
    for work in pieces:
        seen = trained_on(monkeypatch, work)
        assert seen and not seen & heldout, work
    measured = job.tokenized(job.heldout_completions(4))
    assert set(map(tuple, measured.prompts)) <= heldout
    assert not set(map(tuple, job.pairs.prompts)) & set(map(tuple, measured.prompts))


def test_zoo_trains_on_no_heldout_prompt_and_tunes_on_no_test_prompt(smoke, tmp_path, monkeypatch):
    job = zoo.Zoo(smoke, 0, tmp_path, None)
    job.load()
    job.comparisons()
    job.heldout_samples()
    prompts, pairs = {}, {}
    for part in ("test", "tuning"):
        own, _, compared, _ = job.heldout(part)
        prompts[part], pairs[part] = set(map(tuple, own)), set(map(tuple, compared.prompts))
    assert len(prompts["test"]) == 8 and len(prompts["tuning"]) == 4
    assert pairs["test"] <= prompts["test"] and pairs["tuning"] <= prompts["tuning"]
    assert not prompts["test"] & prompts["tuning"]
    for run_ in zoo.grid():
        seen = trained_on(monkeypatch, functools.partial(job.tune, run_))
        assert seen and not seen & (prompts["test"] | prompts["tuning"]), run_
