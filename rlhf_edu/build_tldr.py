"""The checkpoints and results of the TL;DR world: `python -m rlhf_edu build tldr`, then `build tldr-results`.

SFT from scratch on reference summaries; two SFT samples a post, labelled by the exact judge with some noise; from
those a reward model, DPO, Preferred-FT, and PPO against the learned reward. As in `build`, a stage that was
interrupted goes on where it stopped and a finished one is not done again: delete its folder for that.
"""

import dataclasses
import functools
import json
import platform
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
import transformers

from . import __version__, data, evaluate, losses, sft, sharding, tldr
from .errors import UserError
from .logprobs import batch_token_logps
from .models import classifier_from, copy_of, freeze, load_classifier, load_policy, new_policy, save_model
from .pairs import tokenize_pairs
from .ppo import PPOConfig, train_ppo
from .preference import train_preference
from .progress import Progress
from .reward_model import pair_accuracy, train_reward_model
from .rewards import Labeler, reward_model_score
from .sampling import sample
from .tables import read_csv, read_json, write_csv, write_json
from .tokens import collate, decode_responses, encode, encode_responses
from .training import TrainConfig, rng, set_threads, train

RESULTS = data.DATA / "results" / "tldr"
METHODS = ("dpo", "preferred_ft", "ppo")
RESULT_SEEDS = (0, 1, 2)
POSTS = {
    "sft": 1,
    "comparisons": 2,
    "watch": 3,
    "test": 4,
    "best_of_n": 5,
}  # seeds: nothing is in two of them
JUDGED = ["win", "win_low", "win_high", "score", "faithful", "covered", "invented", "words", "ended"]
COLUMNS = {
    "win_rates": ["style", "policy", "seed", "temperature", *JUDGED, "posts"],
    "over_training": ["policy", "seed", "step", "examples", "temperature", *JUDGED, "posts"],
    "best_of_n": ["style", "n", "win", "win_se", "score", "score_se", "kl", "posts"],
}


SFT = TrainConfig(steps=1100, learning_rate=3e-3, warmup=0.05, weight_decay=0.1, final=0.02, save_seconds=60)
PPO = PPOConfig(
    rollouts=20, episodes=64, max_tokens=tldr.LONGEST_SUMMARY, missing_eos_score=-3.0, learning_rate=2e-4
)


@dataclasses.dataclass(frozen=True)
class TldrConfig:
    """Everything that decides the numbers; `SMOKE` is for tests."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    sft_posts: int = 12_000
    sft: TrainConfig = SFT
    sft_batch: int = 32
    comparison_posts: int = 3000
    label_temperature: float = 0.05  # of the Bradley-Terry labeler, in units of the judge's score
    pairs_a_batch: int = 32
    reward_rate: float = 1e-3
    dpo_rate: float = 5e-4
    dpo_beta: float = 0.1
    preferred_ft_rate: float = 5e-4
    ppo: PPOConfig = PPO
    watch_posts: int = 128  # judged every so often while a method is trained
    watches: int = 6
    watch_temperature: float = 0.25
    test_posts: int = 300
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    best_of_posts: int = 100
    best_of: int = 128

    @property
    def steps(self) -> int:
        """Updates of one pass over the comparisons."""
        return self.comparison_posts // self.pairs_a_batch


SMOKE = TldrConfig(
    layers=1, width=16, heads=2, sft_posts=64, sft=TrainConfig(steps=4, learning_rate=1e-3), comparison_posts=16,
    pairs_a_batch=8, ppo=PPOConfig(rollouts=2, episodes=8, max_tokens=12), watch_posts=4, watches=2, test_posts=4,
    temperatures=(0.0, 1.0), best_of_posts=3, best_of=4,
)  # fmt: skip


class Workshop:
    """What the stages share: the folder of what ships, and the one of the runs, which need not be kept."""

    def __init__(self, folder: Path, work: Path, seed: int, config: TldrConfig):
        self.folder, self.work, self.seed, self.config = Path(folder), Path(work), seed, config
        self.progress = Progress({})

    @functools.cached_property
    def tokenizer(self):
        return tldr.make_tokenizer()

    def check_config(self) -> None:
        """The finished runs in the work folder are those of this configuration, or a clear word."""
        path, config = self.work / "config.json", json.loads(json.dumps(dataclasses.asdict(self.config)))
        if not path.exists():
            write_json(config, path)
        elif read_json(path, ()) != config:
            raise UserError(f"{self.work} holds runs with other settings: delete it or move it away")

    def save(self, model, folder: Path, card: dict, started: float) -> None:
        card["seconds"] = round(time.monotonic() - started)
        card["parameters"] = sum(p.numel() for p in model.parameters())
        save_model(model, self.tokenizer, folder, card, half=True)
        shutil.rmtree(folder.with_name(f"{folder.name}.run"), ignore_errors=True)
        print(json.dumps(card, indent=2))

    def loop(self, folder: Path) -> dict:
        """Where `training.train` keeps its state while this folder is in the making, and how it tells of itself."""
        return {"folder": folder.with_name(f"{folder.name}.run"), "progress": self.progress.update}


def summarize(policy, tokenizer, posts, *, temperature: float = 1.0, seed: int = 0) -> list[str]:
    """One sampled summary for each post."""
    prompts = encode(tokenizer, [p.prompt for p in posts])
    responses = sample(
        policy, prompts, eos_id=tokenizer.eos_token_id, max_tokens=tldr.LONGEST_SUMMARY,
        temperature=temperature, seed=seed,
    )  # fmt: skip
    return decode_responses(tokenizer, responses)


def wins(posts, scores) -> np.ndarray:
    """1 where a score (posts, ...) is above that of the post's reference summary, 0.5 where it is equal, else 0."""
    references = tldr.scores(posts, [tldr.reference_summary(p) for p in posts])
    lead = np.asarray(scores) - references.reshape(-1, *[1] * (np.ndim(scores) - 1))
    return np.where(abs(lead) < 1e-9, 0.5, lead > 0)


def judged(posts, summaries) -> dict:
    """Win rate against the references in percent, with a 95 % interval by bootstrap over posts, and mean judgments."""
    table = pd.DataFrame([tldr.judge_summary(p, s) for p, s in zip(posts, summaries, strict=True)])
    won = 100 * wins(posts, table["score"])
    draws = won[rng(0, 109).integers(len(won), size=(2000, len(won)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "win": won.mean(),
        "win_low": low,
        "win_high": high,
        **table.mean().to_dict(),
        "posts": len(posts),
    }


# --- what ships ---------------------------------------------------------------------------------------------------


def build_tokenizer(shop: Workshop) -> None:
    shop.tokenizer.save_pretrained(shop.folder / "tokenizer")


def build_sft(shop: Workshop) -> None:
    """From scratch, loss on the summary alone, short posts first: a tiny model learns to copy from them sooner.

    A batch is drawn from the shortest tenth of the posts at first, and from all of them after 70 % of the updates.
    """
    started, config, tokenizer = time.monotonic(), shop.config, shop.tokenizer
    policy = new_policy(
        tokenizer, shop.seed, layers=config.layers, width=config.width, heads=config.heads, context=tldr.CONTEXT
    ).requires_grad_(True)  # fmt: skip

    def demonstrations(count, seed):
        posts = tldr.posts(count, seed)
        prompts = encode(tokenizer, [p.prompt for p in posts])
        summaries = [tldr.reference_summary(p) for p in posts]
        return prompts, encode_responses(tokenizer, summaries, max_tokens=tldr.LONGEST_SUMMARY)

    prompts, responses = demonstrations(config.sft_posts, POSTS["sft"])
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    by_length = np.argsort(lengths, kind="stable")

    def batch_of(step):
        pool = max(
            len(lengths) // 10, config.sft_batch, int(len(lengths) * min(1, step / config.sft.steps / 0.7))
        )
        rows = np.sort(rng(shop.seed, 113, step).choice(pool, config.sft_batch, replace=False))
        return by_length[rows]  # sorted by length: little padding

    def loss_of(rows):
        parts = [rows[i : i + 16] for i in range(0, len(rows), 16)]
        batches = [
            collate([prompts[i] for i in part], [responses[i] for i in part], tokenizer.pad_token_id)
            for part in parts
        ]
        return -torch.cat([batch_token_logps(policy, batch) for batch in batches]).mean(), {}

    train(policy, batch_of, loss_of, config.sft, **shop.loop(shop.folder / "sft"))
    card = {
        "what": "SFT policy of the TL;DR world: from scratch on posts and their reference summaries",
        "demonstrations": len(prompts),
        "updates": config.sft.steps,
        "heldout_perplexity_per_summary_token": round(
            float(np.exp(sft.heldout_loss(policy, *demonstrations(500, POSTS["watch"]), tokenizer))), 3
        ),
    }
    shop.save(policy, shop.folder / "sft", card | measured(shop, policy), started)


def measured(shop: Workshop, policy) -> dict:
    """For a card: how the exact judge finds samples at temperature 1, on posts nothing was trained on."""
    posts = tldr.posts(shop.config.test_posts, POSTS["watch"])
    row = judged(posts, summarize(policy, shop.tokenizer, posts, seed=shop.seed + 1))
    names = {
        "win": "win_rate_against_references",
        "score": "score",
        "faithful": "faithful",
        "covered": "covered",
    }
    names |= {"invented": "invented_a_summary", "words": "words", "ended": "ended"}
    return {"at_temperature_1": {name: round(float(row[key]), 3) for key, name in names.items()}}


def build_comparisons(shop: Workshop) -> None:
    """Two SFT samples a post, the better one by the exact judge more likely to be chosen."""
    posts = tldr.posts(shop.config.comparison_posts, POSTS["comparisons"])
    policy = load_policy(shop.folder / "sft")
    twice = [p for p in posts for _ in range(2)]
    texts = summarize(policy, shop.tokenizer, twice, seed=shop.seed + 2)
    rows = data.completion_rows(
        [p.prompt for p in posts], texts, tldr.scores(twice, texts), [len(t.split()) for t in texts]
    )
    labeler = Labeler(temperature=shop.config.label_temperature, seed=shop.seed)
    data.write_jsonl(shop.folder / "comparisons.jsonl", list(data.all_pairs(rows, labeler)))


def read_comparisons(folder: Path = tldr.FOLDER):
    """The shipped comparisons: {"prompt", "chosen", "rejected"}, the judge's scores as *_reward, words as *_length."""
    columns = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward")
    return datasets.Dataset.from_list(data.read_jsonl(folder / "comparisons.jsonl", columns))


def token_pairs(shop: Workshop, comparisons):
    return tokenize_pairs(comparisons, shop.tokenizer, max_tokens=tldr.LONGEST_SUMMARY)


def split(comparisons):
    """(training, held-out) comparisons: the last tenth is for the reward model's accuracy."""
    cut = len(comparisons) - len(comparisons) // 10
    return comparisons.select(range(cut)), comparisons.select(range(cut, len(comparisons)))


def build_reward(shop: Workshop) -> None:
    started, tokenizer = time.monotonic(), shop.tokenizer
    train_rows, heldout = split(read_comparisons(shop.folder))
    model = classifier_from(load_policy(shop.folder / "sft"), labels=1, seed=shop.seed).requires_grad_(True)
    train_reward_model(
        model, token_pairs(shop, train_rows), tokenizer=tokenizer,
        config=TrainConfig(steps=shop.config.steps, learning_rate=shop.config.reward_rate, seed=shop.seed),
        batch_size=shop.config.pairs_a_batch, **shop.loop(shop.folder / "reward"),
    )  # fmt: skip
    right = [r if r["chosen_reward"] > r["rejected_reward"] else swapped(r) for r in heldout]
    right = [r for r in right if r["chosen_reward"] != r["rejected_reward"]]
    pairs = token_pairs(shop, heldout)
    values = reward_model_score(model, tokenizer)(pairs.prompts, pairs.responses)
    card = {
        "what": "reward model of the TL;DR world: trained on comparisons of SFT samples, labelled with noise",
        "training_pairs": len(train_rows),
        "heldout_pairs": len(heldout),
        "heldout_accuracy_on_labels": round(pair_accuracy(model, pairs, tokenizer), 4),
        "heldout_accuracy_on_scores": round(
            pair_accuracy(model, token_pairs(shop, datasets.Dataset.from_list(right)), tokenizer), 4
        ),
        "labels_that_agree_with_scores": round(
            float(np.mean([r["chosen_reward"] > r["rejected_reward"] for r in heldout])), 4
        ),
        "mean": round(float(values.mean()), 5),  # of SFT samples; subtract it and divide by std before PPO
        "std": round(float(values.std()), 5),
    }
    shop.save(model, shop.folder / "reward", card, started)


def swapped(row: dict) -> dict:
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {"prompt": row["prompt"]} | {
        f"{other[side]}{end}": row[f"{side}{end}"] for side in other for end in ("", "_reward", "_length")
    }


def build_policy(shop: Workshop, method: str) -> None:
    """The policy that ships is the one of seed 0 of the results, so it is trained there and copied."""
    trained = train_method(shop, method, shop.seed)
    shutil.rmtree(copy := shop.folder / f"{method}.tmp", ignore_errors=True)
    shutil.copytree(trained, copy).rename(shop.folder / method)


def train_method(shop: Workshop, method: str, seed: int) -> Path:
    """One training run in the work folder, unless it is there: the policy, and what was judged on the way."""
    folder, config, tokenizer = shop.work / f"{method}-seed{seed}", shop.config, shop.tokenizer
    if folder.exists():
        return folder
    started = time.monotonic()
    policy = load_policy(shop.folder / "sft").requires_grad_(True)
    watched = tldr.posts(config.watch_posts, POSTS["watch"])
    steps = config.ppo.rollouts * config.ppo.updates_a_rollout if method == "ppo" else config.steps
    marks = {round(steps * i / config.watches) for i in range(config.watches + 1)}
    loop = shop.loop(folder)

    def watch(step):
        if step not in marks:
            return None
        with sharding.whole(policy):
            texts = summarize(policy, tokenizer, watched, temperature=config.watch_temperature, seed=seed)
        return judged(watched, texts)

    if method == "ppo":
        ppo = dataclasses.replace(config.ppo, seed=seed)
        card = read_json(shop.folder / "reward" / "card.json", ("mean", "std"))
        raw = reward_model_score(freeze(load_classifier(shop.folder / "reward")), tokenizer)
        prompts = encode(tokenizer, sorted(set(read_comparisons(shop.folder)["prompt"])))
        metrics = train_ppo(
            policy, prompts, lambda p, r: (raw(p, r) - card["mean"]) / card["std"], tokenizer=tokenizer,
            reference=freeze(copy_of(policy)), config=ppo, after_step=watch, **loop,
        )  # fmt: skip
        examples = ppo.episodes / ppo.updates_a_rollout
    else:
        loss, kwargs, rate = {
            "dpo": (losses.dpo_loss, {"beta": config.dpo_beta}, config.dpo_rate),
            "preferred_ft": (losses.preferred_ft_loss, {}, config.preferred_ft_rate),
        }[method]
        metrics = train_preference(
            policy, token_pairs(shop, read_comparisons(shop.folder)), loss, tokenizer=tokenizer,
            config=TrainConfig(steps=config.steps, learning_rate=rate, seed=seed), loss_kwargs=kwargs,
            reference=freeze(copy_of(policy)), batch_size=config.pairs_a_batch, after_step=watch, **loop,
        )  # fmt: skip
        examples = config.pairs_a_batch
    table = metrics[metrics["win"].notna()].assign(
        policy=method,
        seed=seed,
        temperature=config.watch_temperature,
        examples=lambda t: t["step"] * examples,
    )
    write_csv(table[COLUMNS["over_training"]], shop.work / f"{folder.name}.over_training.csv")
    what = {
        "dpo": "DPO",
        "ppo": "PPO with the learned reward model",
        "preferred_ft": "SFT on the chosen summaries",
    }
    card = {"what": f"{what[method]}, from the SFT policy of the TL;DR world", "seed": seed, "updates": steps}
    shop.save(policy, folder, card | measured(shop, policy), started)
    return folder


STAGES = {
    "tokenizer": build_tokenizer,
    "sft": build_sft,
    "comparisons": build_comparisons,
    "reward": build_reward,
    **{method: lambda shop, method=method: build_policy(shop, method) for method in METHODS},
}


def build(
    folder: Path = tldr.FOLDER, stages=(), *, work: Path = Path("outputs/tldr"), seed: int = 0,
    threads: int | None = None, config: TldrConfig = TldrConfig(),
) -> None:  # fmt: skip
    """Train what ships; `work` holds the runs."""
    if unknown := [s for s in stages if s not in STAGES]:
        raise UserError(f"unknown stage {unknown[0]!r} of tldr: use some of {', '.join(STAGES)}")
    set_threads(threads)
    shop = Workshop(folder, work, seed, config)
    shop.check_config()
    shop.progress = Progress(
        {"tokenizer": 0, "sft": 6, "comparisons": 1, "reward": 1.2, "dpo": 1.5, "preferred_ft": 1, "ppo": 2}
    )
    for name in set(STAGES) - set(stages or STAGES):
        shop.progress.skip(name)
    for name in stages or STAGES:
        done = shop.folder / ("comparisons.jsonl" if name == "comparisons" else name)
        if done.exists():
            print(f"{name}: already at {done}; delete it to build it again")
            shop.progress.skip(name)
            continue
        shop.progress.start(name)
        STAGES[name](shop)
        shop.progress.finish()


# --- results ------------------------------------------------------------------------------------------------------


def win_rate_rows(shop: Workshop, policy, name: str, seed: int) -> pd.DataFrame:
    """One row a style and temperature."""
    rows = []
    for style in tldr.STYLES:
        posts = tldr.posts(shop.config.test_posts, POSTS["test"], style)
        for temperature in shop.config.temperatures:
            texts = summarize(policy, shop.tokenizer, posts, temperature=temperature, seed=seed)
            row = {"style": style, "policy": name, "seed": seed, "temperature": temperature}
            rows.append(row | judged(posts, texts))
    return pd.DataFrame(rows)[COLUMNS["win_rates"]]


def best_of_n_rows(shop: Workshop) -> pd.DataFrame:
    """Expected win rate and score of the sample, of N from SFT at temperature 1, that the reward model likes best."""
    config, tokenizer = shop.config, shop.tokenizer
    policy, reward = load_policy(shop.folder / "sft"), freeze(load_classifier(shop.folder / "reward"))
    ns, parts = [2**i for i in range(config.best_of.bit_length())], []
    for number, style in enumerate(tldr.STYLES):
        posts = tldr.posts(config.best_of_posts, POSTS["best_of_n"], style)
        many = [p for p in posts for _ in range(config.best_of)]
        texts = summarize(policy, tokenizer, many, seed=shop.seed + 7)
        shape = (len(posts), config.best_of)
        scores = tldr.scores(many, texts).reshape(shape)
        ids = [encode(tokenizer, [p.prompt for p in many]),
               encode_responses(tokenizer, texts, max_tokens=tldr.LONGEST_SUMMARY)]  # fmt: skip
        liked = reward_model_score(reward, tokenizer)(*ids).reshape(shape)
        won = evaluate.best_of_n(100 * wins(posts, scores), ns, choose_by=liked)
        best = evaluate.best_of_n(scores, ns, choose_by=liked)
        won = won.rename(columns={"reward": "win", "reward_se": "win_se"})
        best = best.rename(columns={"reward": "score", "reward_se": "score_se"})
        parts.append(
            won.assign(score=best["score"], score_se=best["score_se"], style=style, posts=len(posts))
        )
        shop.progress.update((number + 1) / 2)
    return pd.concat(parts)[COLUMNS["best_of_n"]]


def results(
    folder: Path = tldr.FOLDER, *, output: Path = RESULTS, work: Path = Path("outputs/tldr"), seeds=RESULT_SEEDS,
    threads: int | None = None, config: TldrConfig = TldrConfig(), command: str = "",
) -> None:  # fmt: skip
    """Train the methods from the seeds, judge everything, and write the CSV files; finished parts are kept in `work`."""
    set_threads(threads)
    shop = Workshop(folder, work, 0, config)
    shop.check_config()
    runs = [("sft", 0), *((method, seed) for seed in seeds for method in METHODS)]
    plan = (
        {f"train {m} {s}": 1.5 for m, s in runs[1:]}
        | {f"judge {m} {s}": 1.0 for m, s in runs}
        | {"Best-of-N": 6}
    )
    shop.progress = Progress(plan)

    def part(name: str, done: Path, do) -> None:
        if done.exists():
            shop.progress.skip(name)
            return
        shop.progress.start(name)
        started = time.monotonic()
        do(done)
        if not name.startswith("train"):  # a policy has its seconds in its card
            write_json({"seconds": round(time.monotonic() - started, 1)}, work / f"{name}.seconds.json")
        shop.progress.finish()

    for method, seed in runs[1:]:
        part(
            f"train {method} {seed}",
            work / f"{method}-seed{seed}",
            lambda _, m=method, s=seed: train_method(shop, m, s),
        )
    for name, seed in runs:
        trained = shop.folder / "sft" if name == "sft" else work / f"{name}-seed{seed}"
        part(
            f"judge {name} {seed}", work / f"judge-{name}-seed{seed}.csv",
            lambda done, t=trained, n=name, s=seed: write_csv(win_rate_rows(shop, load_policy(t), n, s), done),
        )  # fmt: skip
    part("Best-of-N", work / "best_of_n.csv", lambda done: write_csv(best_of_n_rows(shop), done))
    tables = {
        "win_rates": [work / f"judge-{name}-seed{seed}.csv" for name, seed in runs],
        "over_training": [work / f"{name}-seed{seed}.over_training.csv" for name, seed in runs[1:]],
        "best_of_n": [work / "best_of_n.csv"],
    }
    for name, paths in tables.items():
        numbers = [c for c in COLUMNS[name] if c not in ("style", "policy")]
        write_csv(pd.concat([read_csv(p, numbers) for p in paths]), output / f"{name}.csv")
    seconds = {
        f"train {m} {k}": read_json(work / f"{m}-seed{k}" / "card.json", ["seconds"]) for m, k in runs[1:]
    }
    seconds |= {
        n: read_json(work / f"{n}.seconds.json", ["seconds"]) for n in plan if not n.startswith("train")
    }
    run = {
        "config": dataclasses.asdict(config),
        "seeds": list(seeds),
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rlhf_edu": __version__,
        },
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "seconds": {name: value["seconds"] for name, value in seconds.items()},
    }
    write_json(run, output / "run.json")


def command(options) -> None:
    """`python -m rlhf_edu build tldr [STAGE ...]` and `build tldr-results`, from the options of `build`."""
    folder = options.output or tldr.FOLDER
    name, *stages = options.stages
    if name == "tldr":
        return build(folder, stages, seed=options.seed, threads=options.threads)
    if stages:
        raise UserError(f"tldr-results takes no stages, but was given {stages[0]!r}: leave it out")
    results(folder, threads=options.threads, command="python -m rlhf_edu build tldr-results")
