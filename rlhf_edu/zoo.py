"""The objective zoo: every method of SimPO's Table 3, and the DPO paper's two, on one footing.

What is the same for all: the SFT policy they start from, the comparisons (four SFT samples a prompt, all pairs,
labelled by the oracle), one pass over them in the same order, and a tuning grid of three settings. What is tuned
is the method's main hyperparameter; the learning rate is the scale's, except SimPO's, which is half of it as in
the main job (its authors call the rate critical), and that of Preferred-FT, which has nothing else to tune.

Of the three settings the one is kept that wins most often against SFT samples on the *tuning* prompts, among
those with a sequence KL of at most `KL_LIMIT`. It alone is measured on the *test* prompts, which had no part in
the choice, and trained again from other seeds. Nobody trains on either kind of prompt.
"""

import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from . import data, evaluate, experiments, losses, parallel, training
from .band import configurations, together
from .errors import UserError
from .experiments import Job
from .logprobs import all_logps
from .models import copy_of, load_policy, save_model
from .preference import train_preference
from .progress import Progress
from .scales import Scale
from .sweep import SIMPO_RATE, Run, slug
from .tables import COLUMNS, read_csv, read_json, write_csv, write_json

KL_LIMIT = 15.0  # nats a response; a setting beyond it is not chosen, however often it wins
TUNING_PROMPTS = 128
RESULTS = data.DATA / "results" / "zoo"
SAMPLES = 4  # SFT samples of each held-out prompt: opponents, and the held-out pairs

GRID = {  # method: loss, then three times (settings, learning rate as a share of the scale's)
    "Preferred-FT": (losses.preferred_ft_loss, ({}, 0.5), ({}, 1.0), ({}, 2.0)),
    # the DPO paper sweeps 0.05, 0.1, 0.5, 1
    "Unlikelihood": (losses.unlikelihood_loss, *(({"alpha": a}, 1.0) for a in (0.1, 0.5, 1.0))),
    # SimPO's Table 7 has lambda 0.1 to 10 for a summed NLL, which leaves the hinge on means little to say
    "RRHF": (losses.rrhf_loss, *(({"nll_weight": w}, 1.0) for w in (1.0, 0.1, 0.01))),
    "SLiC-HF": (
        losses.slic_hf_loss,
        ({"delta": 1.0, "nll_weight": 1.0}, 1.0),
        ({"delta": 1.0, "nll_weight": 0.1}, 1.0),
        ({"delta": 10.0, "nll_weight": 0.1}, 1.0),
    ),
    # as in the main job; Table 7's 0.01 to 0.1 belong to learning rates of 1e-6 and less
    "DPO": (losses.dpo_loss, *(({"beta": b}, 1.0) for b in (0.1, 0.3, 1.0))),
    # target margins of 16.7, 5 and 1.7 nats
    "IPO": (losses.ipo_loss, *(({"tau": t}, 1.0) for t in (0.03, 0.1, 0.3))),
    # lambda = 1 as printed, about 1 / |y| (the token mean of TRL), and less
    "CPO": (losses.cpo_loss, *(({"beta": 0.1, "nll_weight": w}, 1.0) for w in (1.0, 0.06, 0.01))),
    "KTO": (losses.kto_loss, *(({"beta": b}, 1.0) for b in (0.1, 0.3, 1.0))),
    # Table 7: 0.1 to 2
    "ORPO": (losses.orpo_loss, *(({"weight": w}, 1.0) for w in (0.1, 1.0, 10.0))),
    # tokens of a pair differ by up to 30
    "R-DPO": (losses.rdpo_loss, *(({"beta": 0.3, "alpha": a}, 1.0) for a in (0.01, 0.05, 0.1))),
    # gamma / beta = 0.5, where its authors begin; they found larger beta often better
    "SimPO": (losses.simpo_loss, *(({"beta": b, "gamma": b / 2}, SIMPO_RATE) for b in (2.0, 5.0, 10.0))),
}
MEASURES = (
    "reward reward_se kl kl_se length ended prompts win win_se accuracy accuracy_h pairs seconds_a_step"
)
COLUMNS["zoo"] = f"seed stage method run knob rate chosen steps {MEASURES}"


def grid() -> list[Run]:
    """The 33 settings, three a method, as runs."""
    runs = []
    for method, (loss, *settings) in GRID.items():
        for kwargs, rate in settings:
            knob = " ".join(f"{k}={v:g}" for k, v in kwargs.items()) or f"rate={rate:g}"
            runs.append(Run(f"{method} {knob}", method, knob, loss, kwargs, rate))
    return runs


def zoo_scale(scale: Scale) -> Scale:
    """Half of the scale's training prompts, gone through once; the tuning prompts follow the test prompts."""
    tuning = min(TUNING_PROMPTS, scale.heldout_prompts // 2)
    return dataclasses.replace(
        scale,
        train_prompts=scale.train_prompts // 2,
        heldout_prompts=scale.heldout_prompts + tuning,
        epochs=1.0,
    )


def rank_by(run: Run, sums: np.ndarray, lengths: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """(responses,) what the method's loss compares: its implicit reward, without constants that change no order."""
    if run.method in ("DPO", "IPO", "KTO"):
        return sums - ref
    if run.method == "R-DPO":
        return run.loss_kwargs["beta"] * (sums - ref) + run.loss_kwargs["alpha"] * lengths
    if run.method in ("RRHF", "ORPO", "SimPO"):  # log-odds rise with the mean log-prob
        return sums / lengths
    return sums


def choose(tuning: pd.DataFrame) -> list[str]:
    """The run of each method with the highest `win` among those with `kl` <= KL_LIMIT; if none is, the least `kl`."""
    names = []
    for _, part in tuning.groupby("method", sort=False):
        inside = part[part["kl"] <= KL_LIMIT]
        best = inside["win"].idxmax() if len(inside) else part["kl"].idxmin()
        names.append(part.loc[best, "run"])
    return names


class Zoo(Job):
    """A job whose runs are the grid (`tuned` is None), or the chosen runs of another seed's folder."""

    def __init__(self, scale: Scale, seed: int, folder: Path, tuned: Path | None):
        super().__init__(zoo_scale(scale), seed, folder, None, None)
        self.tuned, self.held = tuned, {}
        self.parts = {"test": slice(0, scale.heldout_prompts), "tuning": slice(scale.heldout_prompts, None)}
        self.runs = grid() if tuned is None else chosen_runs(tuned, scale.name)
        self.progress = Progress(
            {"comparisons": 2, "held-out samples": 1, "SFT": 0.3} | dict.fromkeys(self.run_names, 1.0)
        )

    @property
    def run_names(self) -> list[str]:
        return [run.name for run in self.runs]

    def heldout_samples(self) -> None:
        path = self.folder / "heldout_completions.jsonl"
        self.make_completions(path, self.heldout_texts, self.heldout_prompts, SAMPLES, 67)

    def heldout(self, part: str):
        """(prompts, oracle rewards of their SFT samples (prompts, SAMPLES), pairs, reference sums) of a part."""
        if part not in self.held:
            rows = self.heldout_completions(SAMPLES)[self.parts[part]]
            pairs = self.tokenized(rows)
            reference = all_logps(self.sft, self.pad, pairs.prompts, pairs.responses).double().numpy()
            opponents = np.array([row["rewards"] for row in rows])
            self.held[part] = self.heldout_prompts[self.parts[part]], opponents, pairs, reference
        return self.held[part]

    def measure(self, policy, run: Run, part: str) -> dict:
        """All of `MEASURES` but the seconds, on the "test" or the "tuning" prompts."""
        prompts, opponents, pairs, reference = self.heldout(part)
        row = evaluate.evaluate_policy(
            policy, self.sft, prompts, self.true_score, tokenizer=self.tokenizer, against=opponents,
            seed=self.seed + (1000 if part == "test" else 3000), max_tokens=self.scale.max_tokens,
        )  # fmt: skip
        sums = all_logps(policy, self.pad, pairs.prompts, pairs.responses).double().numpy()
        lengths = np.array([len(r) for r in pairs.responses])
        scores = {"accuracy": rank_by(run, sums, lengths, reference), "accuracy_h": sums - reference}
        for name, values in scores.items():
            margin = values[pairs.chosen] - values[pairs.rejected]
            row[name] = float(((margin > 0) + 0.5 * (margin == 0)).mean())
        return row | {"pairs": len(pairs)}

    def sft_row(self) -> None:
        run = Run("SFT", "SFT")
        row = {"step": 0, "seconds_a_step": 0.0, **self.measure(self.sft, run, "test")}
        self.save_evaluations("SFT", pd.DataFrame([row]), self.sft)

    def trained(self, run: Run):
        """(policy, seconds a step): one pass over the comparisons, or the rest of it."""
        policy, times = copy_of(self.sft).requires_grad_(True), [time.monotonic()]
        config = self.train_config(1.0, self.scale.learning_rate * run.rate, run.seed)
        metrics = train_preference(
            policy, self.pairs, run.loss, tokenizer=self.tokenizer, config=config, reference=self.sft,
            loss_kwargs=run.loss_kwargs, batch_size=self.scale.pairs_a_batch, reference_cache=self.reference_cache,
            folder=self.folder / "runs" / slug(run.name), progress=self.progress.update,
            memory=self.scale.memory, fingerprint={"run": run.name}, after_step=lambda step: times.append(time.monotonic()),
        )  # fmt: skip
        write_csv(metrics, self.training_path(run.name))
        return policy, float(np.median(np.diff(times)))

    def tune(self, run: Run) -> None:
        """One setting on the tuning prompts; its policy is kept until its method has chosen."""
        policy, seconds = self.trained(run)
        save_model(policy, self.tokenizer, self.folder / "policies" / slug(run.name))
        row = self.measure(policy, run, "tuning")
        row |= {"step": self.scale.steps(1.0), "seconds_a_step": seconds}
        write_csv(pd.DataFrame([row]), self.folder / "tuning" / f"{slug(run.name)}.csv")
        parallel.remove(self.folder / "runs" / slug(run.name))

    def final(self, run: Run) -> None:
        """The chosen setting on the test prompts."""
        kept = self.folder / "policies" / slug(run.name)
        if self.tuned is None:
            policy = load_policy(kept)
            seconds = self.tuning_table([run])["seconds_a_step"].iloc[0]
        else:
            policy, seconds = self.trained(run)
        row = {"step": self.scale.steps(1.0), "seconds_a_step": seconds}
        row |= self.measure(policy, run, "test")
        self.save_evaluations(run.name, pd.DataFrame([row]), policy, run)
        parallel.remove(self.folder / "runs" / slug(run.name))

    def tuning_table(self, runs: list[Run]) -> pd.DataFrame:
        tables = [
            read_csv(self.folder / "tuning" / f"{slug(r.name)}.csv", MEASURES.split()).assign(
                seed=self.seed, run=r.name, method=r.method, knob=r.knob
            )
            for r in runs
        ]
        return pd.concat(tables, ignore_index=True)

    def points(self) -> None:
        """Train and measure whatever is not yet there; tuning and final runs of a method follow each other."""
        for method in dict.fromkeys(run.method for run in self.runs):
            runs = [run for run in self.runs if run.method == method]
            if self.tuned is None:
                for run in runs:
                    done = self.folder / "tuning" / f"{slug(run.name)}.csv"
                    self.stage(run.name, done, lambda run=run: self.tune(run))
                (name,) = choose(self.tuning_table(runs))
                runs = [run for run in runs if run.name == name]
            (run,) = runs
            label = run.name if self.tuned else f"{method}, test"
            done = self.folder / "points" / f"{slug(run.name)}.csv"
            self.stage(label, done, lambda run=run: self.final(run))
            parallel.remove(self.folder / "policies")

    def collect(self) -> Path:
        """zoo.csv: a row for each tuning run, for SFT and for each chosen run; and samples.csv."""
        frames = []
        if self.tuned is None:
            tuning = self.tuning_table(self.runs)
            chosen = choose(tuning)
            frames.append(tuning.assign(stage="tuning", chosen=tuning["run"].isin(chosen).astype(int)))
        else:
            chosen = self.run_names
        columns = ("step", "run", "method", "knob", *MEASURES.split())
        for name in ("SFT", *chosen):
            point = read_csv(self.folder / "points" / f"{slug(name)}.csv", columns)
            frames.append(point.assign(stage="test", chosen=1))
        rates = {run.name: run.rate for run in grid()} | {"SFT": 0.0}
        table = pd.concat(frames).rename(columns={"step": "steps"})
        table["rate"] = table["run"].map(rates)
        columns = COLUMNS["zoo"].split()
        columns += [c for c in table if c not in columns]
        texts = [
            read_csv(self.folder / "points" / f"{slug(n)}.samples.csv", COLUMNS["samples"].split())
            for n in ("SFT", *chosen)
        ]
        write_csv(pd.concat(texts), self.folder / "samples.csv")
        path = self.folder / "zoo.csv"
        write_csv(table[columns], path)
        return path


def chosen_runs(folder: Path, scale: str) -> list[Run]:
    """The chosen run of each method in a finished zoo that was tuned."""
    config = read_json(folder / "config.json", ("scale",), "name the folder of a finished zoo with --tuned")
    if config["scale"]["name"] != scale:
        raise UserError(
            f"{folder} was tuned at scale {config['scale']['name']}, not {scale}: choose another folder"
        )
    table = read_csv(folder / "zoo.csv", COLUMNS["zoo"].split())
    names = set(table.loc[table["stage"] == "tuning", "run"][table["chosen"] == 1])
    runs = [run for run in grid() if run.name in names]
    if {run.method for run in runs} != set(GRID):
        raise UserError(
            f"{folder} lacks a tuned setting of some method: name the folder of the seed that tuned"
        )
    return runs


def run(
    scale: Scale, seed: int, folder: Path, *, tuned: Path | None = None, threads=None, command=""
) -> Path:
    """Run the zoo in `folder`, or go on with it; return the path of zoo.csv."""
    training.set_threads(threads)
    job = Zoo(scale, seed, folder, tuned)
    with training.only_one(folder):
        experiments.check_config(job, command, runs=job.run_names, kl_limit=KL_LIMIT)
        job.load()
        job.stage("comparisons", folder / "completions.jsonl", job.comparisons)
        job.stage("held-out samples", folder / "heldout_completions.jsonl", job.heldout_samples)
        job.stage("SFT", folder / "points" / "SFT.csv", job.sft_row)
        job.points()
        return job.collect()


def once(scale: Scale, seed: int, one: Run) -> dict:
    """One run of the zoo from its comparisons to its row of zoo.csv, silently and without a folder that stays."""
    with tempfile.TemporaryDirectory() as folder:
        job = Zoo(scale, seed, Path(folder), None)
        job.progress.stream = io.StringIO()
        job.load()
        test = job.parts["test"]
        job.heldout_texts, job.heldout_prompts = job.heldout_texts[test], job.heldout_prompts[test]
        job.comparisons()
        job.heldout_samples()
        policy, seconds = job.trained(one)
        return {"run": one.name, "seconds_a_step": seconds, **job.measure(policy, one, "test")}


def gather(folders: list[Path], output: Path) -> None:
    """tuning.csv, zoo.csv, samples.csv and runs.json of several seeds; each method has one setting in all."""
    configs = configurations(folders)
    table = together(folders, configs, "zoo")
    tuning, test = (table[table["stage"] == stage] for stage in ("tuning", "test"))
    if tuning.empty or tuning["seed"].nunique() > 1:
        raise UserError("one of these zoos must have tuned, and only one: run the others with --tuned")
    if (test.groupby("method")["run"].nunique() > 1).any() or test.duplicated(["seed", "method"]).any():
        raise UserError(
            "a method has two settings or a seed twice: run every other seed with the same --tuned"
        )
    write_csv(tuning, output / "tuning.csv")
    write_csv(test, output / "zoo.csv")
    write_csv(together(folders, configs, "samples"), output / "samples.csv")
    write_json(configs, output / "runs.json")


def shipped(name: str = "zoo") -> pd.DataFrame:
    """The shipped table `zoo` (a row a method and seed, SFT too), `tuning` or `samples`."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise UserError(
            f"{path} is missing: restore it with `git checkout data/results/zoo`, or make it with `python -m rlhf_edu "
            "zoo --seed 0`, the same for seeds 1 and 2 with --tuned outputs/zoo-mini-seed0, and `band`"
        )
    return read_csv(path, COLUMNS["samples" if name == "samples" else "zoo"].split())


def shipped_scale() -> str:
    """The name of the scale at which the shipped tables were made."""
    return json.loads((RESULTS / "runs.json").read_text(encoding="utf-8"))[0]["scale"]["name"]
