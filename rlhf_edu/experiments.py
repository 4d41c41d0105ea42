"""The main job: from prompts to the IMDb frontier (DPO Fig. 2) and the length plots (SimPO Fig. 2).

Each stage leaves its result in the run folder and is not done again when it is there; a stage that was
interrupted goes on from its last checkpoint. Everything follows from the scale and the seed.
"""

import dataclasses
import functools
import io
import json
import os
import platform
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import __version__, data, estimate, evaluate, imdb, parallel, rewards, sharding, tokens, training
from .errors import UserError
from .models import best_device, classifier_from, copy_of, freeze, load_classifier, load_policy, save_model
from .pairs import TokenPairs, tokenize_pairs
from .ppo import train_ppo
from .preference import train_preference
from .progress import Progress
from .reward_model import pair_accuracy, train_reward_model
from .sampling import sample
from .scales import Scale
from .sft import train_sft
from .sweep import LENGTH_LABELER, LENGTH_RUNS, SIMPO_RATE, Run, simpo_reward, slug, sweep  # noqa: F401 - for its users
from .tables import COLUMNS, read_csv, read_json, write_csv, write_json

SAMPLE_PROMPTS = 6


class Job:
    """The state that the stages share: models, prompts, the run folder and its progress."""

    def __init__(
        self, scale: Scale, seed: int, folder: Path, imdb_source: str | None, only: list[str] | None
    ):
        self.scale, self.seed, self.folder, self.imdb_source = scale, seed, Path(folder), imdb_source
        self.runs = sweep(scale)
        if only:
            methods = {r.method for r in self.runs}
            if unknown := [m for m in only if m not in methods]:
                raise UserError(f"unknown method {unknown[0]!r}: use some of {', '.join(sorted(methods))}")
            self.runs = [r for r in self.runs if r.method in only]
        self.reference_cache: dict = {}
        self.progress = Progress(
            {"models": 0.1, "comparisons": 1, "SFT and Best-of-N": 1, "reward model": 1}
            | {r.name: r.cost for r in [*self.runs, *LENGTH_RUNS]}
            | {"length tables": 0.2, "figures and report": 0.1},
            stream=None if parallel.is_main() else io.StringIO(),
        )

    def stage(self, name: str, done: Path, work: Callable[[], None]) -> None:
        """Do `work` unless the file `done`, which it writes last, is there; note its seconds."""
        finished = done.exists()
        parallel.wait()  # all processes have looked before one can have written it
        if finished:
            self.progress.skip(name)
            return
        self.progress.start(name)
        started = time.monotonic()
        work()
        seconds = pd.DataFrame([{"stage": name, "seconds": round(time.monotonic() - started, 1)}])
        path = self.folder / "seconds.csv"
        write_csv(
            pd.concat([read_csv(path, ("stage", "seconds")), seconds]) if path.exists() else seconds, path
        )
        self.progress.finish()
        parallel.wait()

    # --- stages -----------------------------------------------------------------------------------------------

    def load(self) -> None:
        scale, device = self.scale, best_device()
        self.tokenizer = tokens.load_tokenizer(scale.sft or scale.policy)
        self.eos, self.pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        oracle = freeze(load_classifier(scale.oracle, device))
        if scale.sft:
            self.sft = load_policy(scale.sft, device)
            self.true_score = rewards.oracle_score(oracle, self.tokenizer)
        else:
            oracle_tokenizer = tokens.load_tokenizer(scale.oracle)
            self.true_score = rewards.text_oracle_score(oracle, oracle_tokenizer, self.tokenizer)
            self.sft = self.train_sft_here(load_policy(scale.policy, device))
        freeze(self.sft)
        if self.imdb_source or not scale.sft:
            splits = ("train", "test") if scale.sft else ("train", "unsupervised", "test")
            reviews = imdb.load_imdb(self.imdb_source or "hub", splits=splits)
            train_texts = self.real_prompts([r for s in splits[:-1] for r in reviews[s]], scale.train_prompts)
            parts = [train_texts, self.real_prompts(reviews["test"], scale.heldout_prompts, set(train_texts))]
        else:
            parts = [
                data.shipped_prompts("train")[: scale.train_prompts],
                data.shipped_prompts("heldout")[: scale.heldout_prompts],
            ]
        for part, wanted in zip(parts, (scale.train_prompts, scale.heldout_prompts), strict=True):
            if len(part) < wanted:
                raise UserError(
                    f"scale {scale.name} needs {wanted} prompts, but there are only {len(part)}: use --imdb"
                )
        self.train_texts, self.heldout_texts = parts
        self.train_prompts, self.heldout_prompts = (tokens.encode(self.tokenizer, p) for p in parts)

    def real_prompts(
        self, reviews: list[dict], count: int, exclude: frozenset | set = frozenset()
    ) -> list[str]:
        """Prefixes of 2-8 tokens of reviews longer than 200 characters, each text once, none of `exclude`."""
        order = training.rng(self.seed, 51).permutation(len(reviews))
        texts = [reviews[i]["text"] for i in order if len(reviews[i]["text"]) > 200][: 4 * count]
        ids = tokens.encode(self.tokenizer, texts)
        if self.scale.sft:  # our demonstrations: openings that end within a mini policy's context
            starts = [prompt for prompt, _ in imdb.openings(self.tokenizer, ids, self.seed)]
        else:
            starts = imdb.prefixes(self.tokenizer, ids, self.seed)
        prompts = dict.fromkeys(self.tokenizer.decode(p) for p in starts)
        return [p for p in prompts if p not in exclude][:count]

    def train_sft_here(self, policy):
        """SFT on IMDb openings, for scales that ship none."""
        folder = self.folder / "sft"
        finished = (folder / "config.json").exists()
        parallel.wait()
        if finished:
            return load_policy(folder)
        reviews = imdb.load_imdb(self.imdb_source or "hub", splits=("train",))["train"]
        pairs = imdb.openings(
            self.tokenizer, tokens.encode(self.tokenizer, [r["text"] for r in reviews]), self.seed
        )
        config = training.TrainConfig(self.scale.sft_steps, self.scale.sft_learning_rate, seed=self.seed)
        train_sft(
            policy, [p for p, _ in pairs], [[*r, self.eos] for _, r in pairs], tokenizer=self.tokenizer, config=config,
            batch_size=self.scale.sft_batch, memory=self.scale.memory, folder=folder.with_name("sft.run"), progress=self.progress.update,
        )  # fmt: skip
        save_model(policy, self.tokenizer, folder)
        parallel.remove(folder.with_name("sft.run"))
        parallel.wait()
        return policy

    def make_completions(self, path: Path, texts, prompts, count: int, salt: int, batch: int = 256) -> None:
        """`count` SFT samples a prompt with true reward and length, written as completions."""
        repeated = [p for p in prompts for _ in range(count)]
        starts, made = range(0, len(repeated), batch), {}
        for number in parallel.share(len(starts)):
            start = starts[number]
            responses = sample(
                self.sft, repeated[start : start + batch], eos_id=self.eos, max_tokens=self.scale.max_tokens,
                seed=int(training.rng(self.seed, salt, number).integers(2**31)), batch_size=batch,
            )  # fmt: skip
            made |= {start + i: torch.tensor(r) for i, r in enumerate(responses)}
            self.progress.update(0.9 * (start + batch) / len(repeated))
        device = self.sft.device
        responses = [r.long().tolist() for r in parallel.from_all(made, len(repeated), device)]

        def score(rows):
            return torch.from_numpy(
                self.true_score([repeated[i] for i in rows], [responses[i] for i in rows])
            )

        scores = parallel.per_row(score, len(repeated), device).tolist()
        decoded = tokens.decode_responses(self.tokenizer, responses)
        lengths = [len(r) for r in responses]
        rows = data.completion_rows(texts, decoded, scores, lengths)
        data.write_jsonl(path, rows)
        parallel.wait()  # it is read next

    def comparisons(self) -> None:
        self.make_completions(
            self.folder / "completions.jsonl",
            self.train_texts,
            self.train_prompts,
            self.scale.completions,
            61,
        )

    def sft_and_best_of_n(self) -> None:
        """The SFT policy's own point, and what choosing among its samples buys."""
        scale, path = self.scale, self.folder / "heldout_completions.jsonl"
        if not path.exists():
            self.make_completions(path, self.heldout_texts, self.heldout_prompts, scale.best_of, 67)
        completions = data.read_completions(path)
        ns = [2**i for i in range(scale.best_of.bit_length())]
        table = evaluate.best_of_n(np.array([c["rewards"] for c in completions]), ns)
        write_csv(table.assign(seed=self.seed), self.folder / "best_of_n.csv")
        self.save_evaluations("SFT", pd.DataFrame([{"step": 0, **self.evaluate(self.sft)}]), self.sft)

    def train_rewards(self) -> None:
        """The learned reward, trained on the very comparisons that DPO sees."""
        scale = self.scale
        model = classifier_from(self.sft, labels=1, seed=self.seed).requires_grad_(True)
        config = self.train_config(scale.reward_model_epochs, scale.reward_model_learning_rate)
        folder = self.folder / "runs" / "reward model"
        metrics = train_reward_model(
            model, self.pairs, tokenizer=self.tokenizer, config=config, batch_size=scale.pairs_a_batch, folder=folder,
            progress=self.progress.update, memory=scale.memory,
        )  # fmt: skip
        write_csv(metrics, self.folder / "training" / "reward model.csv")
        heldout = self.tokenized(self.heldout_completions(4))
        scores = rewards.reward_model_score(model, self.tokenizer)(self.pairs.prompts, self.pairs.responses)
        card = {
            "heldout_pair_accuracy": pair_accuracy(model, heldout, self.tokenizer),
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            "pairs": len(self.pairs),
        }
        save_model(model, self.tokenizer, self.folder / "reward_model", card)
        parallel.remove(folder)

    def train_run(self, run: Run) -> None:
        scale, policy = self.scale, copy_of(self.sft).requires_grad_(True)
        loop = {
            "folder": self.folder / "runs" / slug(run.name),
            "progress": self.progress.update,
            "fingerprint": {"run": run.name},
            "memory": scale.memory,
        }
        if run.loss is None:
            config = dataclasses.replace(
                scale.ppo,
                kl_target=float(run.knob.split("=")[1]),
                seed=self.seed,
                max_tokens=scale.max_tokens,
            )
            total, per_step = (
                config.rollouts * config.updates_a_rollout,
                config.episodes / config.updates_a_rollout,
            )
            score = self.ppo_score(run.method)
            loop["after_step"] = self.evaluator(policy, total, config.updates_a_rollout)
            metrics = train_ppo(
                policy,
                self.train_prompts,
                score,
                tokenizer=self.tokenizer,
                reference=self.sft,
                config=config,
                **loop,
            )
        else:
            config = self.train_config(scale.epochs * run.epochs, scale.learning_rate * run.rate, run.seed)
            total, per_step = config.steps, scale.pairs_a_batch
            loop["after_step"] = self.evaluator(policy, total)
            metrics = train_preference(
                policy, self.pairs, run.loss, tokenizer=self.tokenizer, config=config, reference=self.sft,
                loss_kwargs=run.loss_kwargs, batch_size=scale.pairs_a_batch, reference_cache=self.reference_cache, **loop,
            )  # fmt: skip
        write_csv(metrics[[c for c in metrics if not c.startswith("eval/")]], self.training_path(run.name))
        points = metrics[metrics["eval/reward"].notna()]
        evaluations = points[["step", *(c for c in points if c.startswith("eval/"))]]
        evaluations = evaluations.rename(columns=lambda c: c.removeprefix("eval/"))
        self.save_evaluations(
            run.name, evaluations.assign(examples=evaluations["step"] * per_step), policy, run
        )
        parallel.remove(loop["folder"])

    def train_length_run(self, run: Run) -> None:
        """One policy on the comparisons of a labeler who likes length; its margins and log-probs, held out."""
        scale, policy = self.scale, copy_of(self.sft).requires_grad_(True)
        folder = self.folder / "runs" / slug(run.name)
        metrics = train_preference(
            policy, self.length_pairs, run.loss, tokenizer=self.tokenizer,
            config=self.train_config(scale.epochs * run.epochs, scale.learning_rate * run.rate), reference=self.sft, loss_kwargs=run.loss_kwargs,
            batch_size=scale.pairs_a_batch, folder=folder, progress=self.progress.update,
            fingerprint={"run": run.name}, memory=scale.memory,
        )  # fmt: skip
        write_csv(metrics, self.training_path(run.name))
        self.write_length_tables(run.method, policy, slug(run.name))
        parallel.remove(folder)

    def write_length_tables(self, method: str, policy, name: str) -> None:
        labeler = dataclasses.replace(LENGTH_LABELER, seed=self.seed + 1)
        pairs = self.tokenized(self.heldout_completions(4), labeler)
        margins, responses = evaluate.length_tables(policy, None, pairs, self.pad, reward=simpo_reward)
        write_csv(
            margins.assign(seed=self.seed, method=method), self.folder / "length" / f"{name}.margins.csv"
        )
        write_csv(
            responses.assign(seed=self.seed, method=method), self.folder / "length" / f"{name}.lengths.csv"
        )

    # --- what the stages share --------------------------------------------------------------------------------

    def tokenized(self, completions: list[dict], labeler: rewards.Labeler | None = None) -> TokenPairs:
        pairs = data.all_pairs(completions, labeler)
        return tokenize_pairs(pairs, self.tokenizer, max_tokens=self.scale.max_tokens)

    @functools.cached_property
    def completions(self) -> list[dict]:
        return data.read_completions(self.folder / "completions.jsonl")

    @functools.cached_property
    def pairs(self) -> TokenPairs:
        return self.tokenized(self.completions)

    @functools.cached_property
    def length_pairs(self) -> TokenPairs:
        return self.tokenized(self.completions, dataclasses.replace(LENGTH_LABELER, seed=self.seed))

    def heldout_completions(self, count: int) -> list[dict]:
        rows = data.read_completions(self.folder / "heldout_completions.jsonl")
        return [{k: v[:count] if isinstance(v, list) else v for k, v in row.items()} for row in rows]

    def ppo_score(self, method: str) -> rewards.Score:
        """Learned or true reward, shifted and scaled so that SFT samples have mean 0 and deviation 1 (Ziegler et al.)."""
        if method == "PPO-GT":
            values = np.array([c["rewards"] for c in self.completions])
            score, mean, std = self.true_score, values.mean(), values.std()
        else:
            folder = self.folder / "reward_model"
            card = read_json(folder / "card.json", ("mean", "std"), f"delete {folder} and start again")
            score = rewards.reward_model_score(freeze(load_classifier(folder)), self.tokenizer)
            mean, std = card["mean"], card["std"]
        return lambda prompts, responses: (score(prompts, responses) - mean) / std

    def train_config(self, epochs: float, learning_rate: float, seed: int = 0) -> training.TrainConfig:
        return training.TrainConfig(
            self.scale.steps(epochs),
            learning_rate,
            warmup=self.scale.warmup,
            schedule=self.scale.schedule,
            seed=self.seed + seed,
        )

    def evaluate(self, policy) -> dict:
        return evaluate.evaluate_policy(
            policy, self.sft, self.heldout_prompts, self.true_score, tokenizer=self.tokenizer, seed=self.seed + 1000,
            max_tokens=self.scale.max_tokens,
        )  # fmt: skip

    def evaluator(self, policy, total: int, multiple: int = 1):
        """after_step: evaluate at `evaluations` steps, spread so that early training is seen too."""
        shares = (np.arange(1, self.scale.evaluations + 1) / self.scale.evaluations) ** 1.7
        steps = {max(multiple, round(total * s / multiple) * multiple) for s in shares}

        def after_step(step: int):
            if step in steps:
                with sharding.whole(policy), sharding.whole(self.sft):  # PPO spreads its reference, too
                    return {f"eval/{k}": v for k, v in self.evaluate(policy).items()}

        return after_step

    def training_path(self, name: str) -> Path:
        return self.folder / "training" / f"{slug(name)}.csv"

    def save_evaluations(self, name: str, table: pd.DataFrame, policy, run: Run | None = None) -> None:
        """The evaluations of a run, and samples of its final policy on the same few prompts."""
        prompts, texts = self.heldout_prompts[:SAMPLE_PROMPTS], self.heldout_texts[:SAMPLE_PROMPTS]
        responses = sample(
            policy, prompts, eos_id=self.eos, max_tokens=self.scale.max_tokens, seed=self.seed + 2000
        )
        samples = pd.DataFrame(
            {
                "run": name,
                "prompt": texts,
                "response": tokens.decode_responses(self.tokenizer, responses),
                "reward": self.true_score(prompts, responses).round(4),
            }
        )
        write_csv(samples, self.folder / "points" / f"{slug(name)}.samples.csv")
        table = table.assign(
            seed=self.seed, run=name, method=run.method if run else "SFT", knob=run.knob if run else ""
        )
        write_csv(table, self.folder / "points" / f"{slug(name)}.csv")

    def collect(self) -> None:
        """One CSV each of all points, samples, margins, lengths; then figures and report."""
        from . import report

        def parts(names, folder, ending, kind):
            paths = [self.folder / folder / f"{slug(n)}{ending}.csv" for n in names]
            return [read_csv(path, COLUMNS[kind].split()) for path in paths]

        names = ["SFT", *(r.name for r in self.runs)]
        points = parts(names, "points", "", "frontier")
        start = points[0].drop(columns=["run", "method", "knob", "step"])
        frames = [points[0].assign(examples=0)]
        for run, table in zip(self.runs, points[1:], strict=True):
            zero = start.assign(run=run.name, method=run.method, knob=run.knob, step=0, examples=0)
            frames.append(pd.concat([zero, table]))
        columns = ["seed", "run", "method", "knob", "step", "examples"]
        frontier = pd.concat(frames)
        write_csv(frontier[columns + [c for c in frontier if c not in columns]], self.folder / "frontier.csv")
        samples = pd.concat(parts(names, "points", ".samples", "samples"))
        write_csv(samples, self.folder / "samples.csv")
        names = ["SFT", *(r.name for r in LENGTH_RUNS)]
        margins, lengths = (pd.concat(parts(names, "length", f".{k}", k)) for k in ("margins", "lengths"))
        write_csv(margins, self.folder / "margins.csv")
        write_csv(lengths, self.folder / "lengths.csv")
        rho = [
            {"seed": self.seed, "method": m, "rho": evaluate.spearman(t), "n": len(t)}
            for m, t in lengths.groupby("method", sort=False)
        ]
        write_csv(pd.DataFrame(rho), self.folder / "correlations.csv")
        band = data.DATA / "results" / self.scale.name
        report.write_figures(self.folder, band if band.exists() else None)
        report.write_report(self.folder, band if band.exists() else None)


def reproduce(
    scale: Scale, seed: int, folder: Path, *, imdb_source: str | None = None, only=None, command=""
) -> Path:
    """Run the main job in `folder`, or go on with it; return the path of the report."""
    training.set_threads()
    job = Job(scale, seed, folder, imdb_source, only)
    with training.only_one(folder):
        return work_in(job, folder, command)


def work_in(job: Job, folder: Path, command: str) -> Path:
    """All stages of the job, in the order of its report; a stage that is done is left as it is."""
    scale, seed = job.scale, job.seed
    check_config(job, command)
    say(
        f"rlhf_edu {__version__}, scale {scale.name}, seed {seed}, device {best_device()}, results in {folder}"
    )
    say(settings(scale))
    if scale.sft is None:
        say(estimate.of_job(scale, best_device()))
    job.load()
    job.stage("comparisons", folder / "completions.jsonl", job.comparisons)
    job.stage("SFT and Best-of-N", folder / "points" / "SFT.csv", job.sft_and_best_of_n)
    if any(run.method == "PPO" for run in job.runs):
        job.stage("reward model", folder / "reward_model" / "card.json", job.train_rewards)
    else:
        job.progress.skip("reward model")
    for run in job.runs:
        job.stage(run.name, folder / "points" / f"{slug(run.name)}.csv", lambda run=run: job.train_run(run))
    for run in LENGTH_RUNS:
        done = folder / "length" / f"{slug(run.name)}.lengths.csv"
        job.stage(run.name, done, lambda run=run: job.train_length_run(run))
    done = folder / "length" / "SFT.lengths.csv"
    job.stage("length tables", done, lambda: job.write_length_tables("SFT", job.sft, "SFT"))
    job.progress.start("figures and report")
    if parallel.is_main():
        job.collect()
    job.progress.finish()
    say(f"Peak memory: {estimate.peak_memory()}")
    return folder / "report.html"


def say(text: str) -> None:
    if parallel.is_main():
        print(text, flush=True)


def settings(scale: Scale) -> str:
    """The whole configuration in one paragraph; it is also saved, in config.json."""
    fields = (f"{f.name}={getattr(scale, f.name)!r}" for f in dataclasses.fields(scale))
    indent = {"initial_indent": "  ", "subsequent_indent": "  "}
    return textwrap.fill(", ".join(fields), 110, break_on_hyphens=False, break_long_words=False, **indent)


def check_config(job: Job, command: str, **more) -> None:
    """Write the run's configuration, or see that the folder belongs to the same one; `more` is part of it."""
    import datasets
    import transformers

    root = f"{data.DATA.parent}{os.sep}"  # the shipped checkpoints are named from here, wherever the checkout lies
    scale = dataclasses.asdict(job.scale)
    config = {
        "scale": {k: v.removeprefix(root) if isinstance(v, str) else v for k, v in scale.items()},
        "seed": job.seed,
        "imdb": job.imdb_source,
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
            "rlhf_edu": __version__,
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    } | more
    keys = ("scale", "seed", "imdb", *more)
    path = job.folder / "config.json"
    if not path.exists():
        write_json(config, path)
        return
    there = read_json(path, keys, "delete the folder or choose another --output")
    # how an update fits into the device may change on the way; a field that an older version lacked had its default
    there["scale"] = config["scale"] | there["scale"] | {"memory": config["scale"]["memory"]}
    if any(there[key] != json.loads(json.dumps(config[key])) for key in keys):
        raise UserError(f"{job.folder} holds a run with other settings: choose another --output or delete it")
