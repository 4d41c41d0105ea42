"""The commands that made the shipped checkpoints and files of `data/`: `python -m rlhf_edu build --imdb FOLDER`.

Each stage reads IMDb, trains, measures on the held-out reviews, and saves to `data/models/mini/<stage>` with a
`card.json` that says what was measured. A stage that was interrupted goes on where it stopped, and a stage that
is finished is not done again: delete its folder for that.
"""

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from . import data, imdb, rewards, sft, tokens
from .errors import UserError
from .models import (
    at_temperature,
    classifier_from,
    freeze,
    load_classifier,
    load_policy,
    new_policy,
    save_model,
)
from .pairs import tokenize_pairs
from .progress import Progress
from .reward_model import pair_accuracy, train_reward_model
from .sampling import sample
from .training import TrainConfig, rng, set_threads, train

VOCABULARY, CONTEXT, LONGEST_RESPONSE = 4096, 64, 48
SFT_TEMPERATURE, PROMPT_TEMPERATURE = 0.7, 0.8
MOST_BROKEN = (
    0.14  # demonstrations of common words: a quarter of the openings, and what a tiny policy can master
)
BASE = TrainConfig(steps=5000, learning_rate=2e-3, warmup=0.04, weight_decay=0.1, save_seconds=60)
SFT = TrainConfig(steps=600, learning_rate=6e-4, warmup=0.05, weight_decay=0.1, final=0.02, save_seconds=60)
ORACLE = TrainConfig(
    steps=3000, learning_rate=6e-4, warmup=0.06, weight_decay=0.1, final=0.02, save_seconds=60
)
ORACLE_CYCLES = (ORACLE, ORACLE, ORACLE, dataclasses.replace(ORACLE, steps=900, learning_rate=4e-4))
TAUGHT = 2  # from this cycle on a linear model of the window has a say in the target
REWARD = TrainConfig(steps=150, learning_rate=3e-4, save_seconds=60)
TRAIN_PROMPTS, HELDOUT_PROMPTS, DEMONSTRATIONS, COMPLETION_PROMPTS, REWARD_PROMPTS = (
    3000,
    512,
    1000,
    500,
    2000,
)


class Workshop:
    """What the stages share; the reviews and their token ids are read when first asked for."""

    def __init__(self, folder: Path, source: str | None, seed: int):
        self.folder, self.source, self.seed = Path(folder), source, seed
        self.progress = Progress(dict(zip(STAGES, (0.2, 10, 5, 6, 1, 1), strict=True)))

    @functools.cached_property
    def reviews(self) -> dict[str, list[dict]]:
        return imdb.load_imdb(self.source)

    @functools.cached_property
    def tokenizer(self):
        return tokens.load_tokenizer(self.folder / "tokenizer")

    def ids(self, split: str) -> list[list[int]]:
        return tokens.encode(self.tokenizer, [r["text"] for r in self.reviews[split]])

    def openings(self, *splits: str):
        """(prompts, responses with EOS) from the reviews of these splits, no longer than a response may be."""
        pairs = [
            p for s in splits for p in imdb.openings(self.tokenizer, self.ids(s), self.seed, MOST_BROKEN)
        ]
        pairs = [(p, [*r, self.tokenizer.eos_token_id]) for p, r in pairs if len(r) < LONGEST_RESPONSE]
        return [p for p, _ in pairs], [r for _, r in pairs]

    def finish(self, stage: str, model, card: dict, started: float) -> None:
        card["seconds"] = round(time.monotonic() - started)
        card["parameters"] = sum(p.numel() for p in model.parameters())
        save_model(model, self.tokenizer, self.folder / stage, card, half=True)
        shutil.rmtree(self.folder / f"{stage}.run", ignore_errors=True)
        print(json.dumps(card, indent=2))


def build_tokenizer(shop: Workshop) -> None:
    texts = (r["text"] for s in ("train", "unsupervised") for r in shop.reviews[s])
    tokens.train_tokenizer(texts, VOCABULARY).save_pretrained(shop.folder / "tokenizer")


def build_base(shop: Workshop, config: TrainConfig = BASE, batch_size: int = 32) -> None:
    """Random windows from inside reviews, one in six from a review's start behind <|endoftext|>.

    <|endoftext|> is never a target: the base policy rambles and cannot stop. That is what SFT has to teach.
    """
    started, tokenizer, seed = time.monotonic(), shop.tokenizer, shop.seed
    ids = [
        np.array(i, dtype=np.int32)
        for s in ("train", "unsupervised")
        for i in shop.ids(s)
        if len(i) > CONTEXT
    ]
    model = new_policy(tokenizer, seed, context=CONTEXT)
    lengths = np.array([len(i) for i in ids], dtype=float)

    def batch_of(step):
        generator = rng(seed, step)
        rows = []
        for index in generator.choice(len(ids), batch_size, p=lengths / lengths.sum()):
            if generator.random() < 1 / 6:
                rows.append([tokenizer.eos_token_id, *ids[index][: CONTEXT - 1]])
            else:
                start = generator.integers(len(ids[index]) - CONTEXT + 1)
                rows.append(ids[index][start : start + CONTEXT])
        return torch.from_numpy(np.array(rows, dtype=np.int64))

    def loss_of(batch):
        logits = model(batch, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), {}

    metrics = train(
        model, batch_of, loss_of, config, folder=shop.folder / "base.run", progress=shop.progress.update
    )
    heldout = [i for i in shop.ids("test") if len(i) > CONTEXT]
    windows = torch.tensor([i[s : s + CONTEXT] for i in heldout[:2000] for s in (0, len(i) - CONTEXT)])
    with torch.no_grad():
        nll = float(np.mean([loss_of(batch)[0].item() for batch in windows.split(40)]))
    card = {
        "what": "base policy: random windows of 75,000 IMDb reviews; never saw an end of text",
        "tokens_seen": config.steps * batch_size * CONTEXT,
        "final_training_loss": round(metrics["loss"].tail(100).mean(), 4),
        "heldout_perplexity_per_token": round(float(np.exp(nll)), 2),
    }
    shop.finish("base", model, card, started)


def build_sft(shop: Workshop, config: TrainConfig = SFT) -> None:
    """Openings of reviews that stop at the end of a sentence, loss on the response alone; then cooled down.

    At temperature 1 so small a policy strays into word fragments every few tokens; at 0.7, where Ziegler et al.
    sample, its texts read like rough reviews. That temperature is folded into the weights.
    """
    started, base = time.monotonic(), load_policy(shop.folder / "base")
    prompts, responses = shop.openings("train", "unsupervised")
    heldout = shop.openings("test")
    before = sft.heldout_loss(base, *heldout, shop.tokenizer)
    sft.train_sft(
        base, prompts, responses, tokenizer=shop.tokenizer, config=config, folder=shop.folder / "sft.run",
        progress=shop.progress.update,
    )  # fmt: skip
    after = sft.heldout_loss(base, *heldout, shop.tokenizer)
    at_temperature(base, SFT_TEMPERATURE)
    card = {
        "what": "SFT policy: openings of IMDb reviews that stop at the end of a sentence",
        "demonstrations": len(prompts),
        "heldout_perplexity_per_response_token": round(float(np.exp(after)), 2),
        "heldout_perplexity_before": round(float(np.exp(before)), 2),
        "temperature": SFT_TEMPERATURE,
        "heldout_perplexity_at_temperature": round(
            float(np.exp(sft.heldout_loss(base, *heldout, shop.tokenizer))), 2
        ),
        "mean_response_tokens": round(float(np.mean([len(r) for r in responses])), 1),
    }
    shop.finish("sft", base, card, started)


def build_oracle(
    shop: Workshop, cycles: tuple[TrainConfig, ...] = ORACLE_CYCLES, batch_size: int = 32
) -> None:
    """A sentiment classifier on windows of all 75,000 reviews, asked at every token of a window.

    The model is causal, so one pass over a window answers for each of its beginnings: 60 answers to learn from
    instead of one, and a judge of texts of any length that does not wait for a full stop. The 50,000 reviews
    without a label get the probability that a linear model of words and word pairs gives the whole review.
    In the last two cycles half of the target is what such a model, trained on other reviews, gives the window itself:
    most windows do not tell the verdict of their review, and this target says so.
    """
    started, seed, shortest, pad = time.monotonic(), shop.seed, 5, shop.tokenizer.pad_token_id
    model = classifier_from(load_policy(shop.folder / "base"), labels=2, seed=seed).requires_grad_(True)
    labels = [r["label"] for r in shop.reviews["train"]] + whole_review_labels(shop.reviews)
    ids = shop.ids("train") + shop.ids("unsupervised")
    reviews = [(np.array(i), label) for i, label in zip(ids, labels, strict=True) if len(i) >= CONTEXT]
    teacher = window_teacher(reviews, shop.tokenizer, seed)

    def batch_of(step):
        generator = rng(seed, step + finished)
        chosen = generator.choice(len(reviews), batch_size, replace=False)
        # two of three are openings, as are the texts to be judged
        windows = [window(reviews[index][0], generator, openings=2 / 3) for index in chosen]
        labels = np.array([reviews[index][1] for index in chosen])
        if cycle >= TAUGHT:
            labels = (labels + teacher(chosen, windows)) / 2
        return torch.from_numpy(np.array(windows)).long(), torch.tensor(labels, dtype=torch.float32)

    def loss_of(batch):
        windows, labels = (x.to(model.device) for x in batch)
        hidden = model.base_model(windows, use_cache=False).last_hidden_state[:, shortest - 1 :]
        logits = model.score(hidden)  # (batch, CONTEXT - shortest + 1, 2)
        targets = torch.stack([1 - labels, labels], dim=-1).repeat_interleave(logits.shape[1], dim=0)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        return loss, {"accuracy": ((logits[:, -1].detach().argmax(-1) == 1) == (labels > 0.5)).float().mean()}

    for cycle, config in enumerate(cycles):  # the rate rises and falls in each: its state is on disk
        finished = sum(c.steps for c in cycles[:cycle])
        between = shop.folder / f"oracle.run/cycle{cycle}"
        if between.exists():
            model = load_classifier(between).requires_grad_(True)
            continue
        train(
            model, batch_of, loss_of, config, folder=shop.folder / "oracle.run", progress=shop.progress.update,
            fingerprint={"cycle": cycle},
        )  # fmt: skip
        save_model(model, shop.tokenizer, between)
        (shop.folder / "oracle.run" / "state.safetensors").unlink(missing_ok=True)
    card = oracle_card(shop, model, pad) | {"windows_seen": sum(c.steps for c in cycles) * batch_size}
    shop.finish("oracle", model, card, started)


def oracle_card(shop: Workshop, model, pad: int) -> dict:
    """Scale the logits, in place, until the confidence fits labelled training reviews; then measure on held-out ones.

    Soft targets leave the classifier less sure than it is right; one factor mends that (temperature scaling, Guo et
    al. 2017) and moves no answer across 1/2.
    """

    def logits_of(texts):
        return rewards.classifier_logits(model.eval(), pad, texts, [[] for _ in texts])

    every = 5
    logits = logits_of([i[:CONTEXT] for i in shop.ids("train")[::every]])
    labels = torch.tensor([r["label"] for r in shop.reviews["train"][::every]])
    factors = np.linspace(0.5, 2, 151)
    losses = [torch.nn.functional.cross_entropy(logits * f, labels).item() for f in factors]
    factor = float(factors[int(np.argmin(losses))])
    with torch.no_grad():
        model.score.weight *= factor
    truth = np.array([r["label"] for r in shop.reviews["test"]])
    accuracy = {}
    for length in (16, 32, CONTEXT):
        logits = logits_of([i[:length] for i in shop.ids("test")])
        accuracy[length] = (logits.argmax(-1).numpy() == truth).mean()
    confidence = logits.softmax(-1).max(-1).values.numpy()
    return {
        "what": "sentiment oracle: probability that a text of up to 64 tokens is from a positive review",
        **{f"heldout_accuracy_first_{n}_tokens": round(float(a), 4) for n, a in accuracy.items()},
        "heldout_reviews": len(truth),
        "heldout_mean_confidence": round(float(confidence.mean()), 4),
        "logit_factor": round(factor, 2),
    }


def window(text: np.ndarray, generator, *, openings: float) -> np.ndarray:
    """CONTEXT tokens of a review: its opening with that probability, else any."""
    start = 0 if generator.random() < openings else int(generator.integers(len(text) - CONTEXT + 1))
    return text[start : start + CONTEXT]


def linear_model(strength: float, min_df: int):
    """A tf-idf vectorizer of words and word pairs, and a logistic regression that is not fitted yet."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise UserError("building the oracle needs scikit-learn: pip install -e .[build]") from error
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=min_df, sublinear_tf=True, dtype=np.float32)
    return words, LogisticRegression(C=strength, max_iter=200)


def window_teacher(reviews: list[tuple[np.ndarray, float]], tokenizer, seed: int, folds: int = 4):
    """teacher(indices, windows) -> probability of a positive review, each from a model that never saw the review.

    One linear model a fold, fitted on the opening and on a random window of the reviews of all other folds. A
    label of 0.8 counts as 0.8 of a positive and 0.2 of a negative example.
    """
    generator = rng(seed, 29)
    pieces = [window(text, generator, openings=o) for o in (1, 0) for text, _ in reviews]
    words, model = linear_model(3, min_df=4)
    from sklearn.base import clone  # here, where linear_model has said what to do without scikit-learn

    features = words.fit_transform(tokenizer.decode(p) for p in pieces)
    of = np.tile(np.arange(len(reviews)), 2)
    labels, fold = np.array([label for _, label in reviews])[of], of % folds
    models = []
    for k in range(folds):
        rows = {
            y: np.flatnonzero((fold != k) & (weight > 0.02)) for y, weight in ((1, labels), (0, 1 - labels))
        }
        index = np.concatenate([rows[1], rows[0]])
        positive = np.repeat([1, 0], [len(rows[1]), len(rows[0])])
        weights = np.where(positive == 1, labels[index], 1 - labels[index])
        models.append(clone(model).fit(features[index], positive, sample_weight=weights))

    def teacher(indices, windows) -> np.ndarray:
        logits = words.transform(tokenizer.decode(w) for w in windows)
        return np.array(
            [models[i % folds].predict_proba(row)[0, 1] for i, row in zip(indices, logits, strict=True)]
        )

    return teacher


def whole_review_labels(reviews: dict[str, list[dict]]) -> list[float]:
    """Probability that each unlabelled review is positive, from a logistic regression on words and word pairs."""
    train = reviews["train"]
    words, teacher = linear_model(30, min_df=5)
    features = words.fit_transform(r["text"] for r in train)
    teacher.fit(features, [r["label"] for r in train])
    heldout = teacher.score(
        words.transform(r["text"] for r in reviews["test"]), [r["label"] for r in reviews["test"]]
    )
    print(f"whole reviews, linear model: accuracy {heldout:.4f} on held-out reviews")
    return teacher.predict_proba(words.transform(r["text"] for r in reviews["unsupervised"]))[:, 1].tolist()


def build_prompts(shop: Workshop) -> None:
    """Prompts, demonstrations and completions, all written by our own checkpoints: no review text is copied."""
    tokenizer, seed, end = shop.tokenizer, shop.seed, shop.tokenizer.eos_token_id
    base, policy = load_policy(shop.folder / "base"), load_policy(shop.folder / "sft")
    wanted = TRAIN_PROMPTS + HELDOUT_PROMPTS
    prompts: dict[str, None] = {}
    for number in range(
        40
    ):  # the base policy writes openings behind <|endoftext|>; their first words are prompts
        generator = rng(seed, 71, number)
        texts = sample(
            base,
            [[end]] * 512,
            eos_id=end,
            max_tokens=10,
            temperature=PROMPT_TEMPERATURE,
            seed=int(generator.integers(2**31)),
            batch_size=512,
        )
        for ids in texts:
            cuts = [
                c for c in tokens.prefix_lengths(tokenizer, ids) if not imdb.broken_words(tokenizer, ids[:c])
            ]
            if cuts:
                text = tokenizer.decode(ids[: int(generator.choice(cuts))])
                if 2 <= len(tokens.encode(tokenizer, [text])[0]) <= 8:
                    prompts.setdefault(text)
        if len(prompts) >= wanted:
            break
    train_texts, heldout = data.split_prompts(list(prompts)[:wanted], HELDOUT_PROMPTS, seed)
    data.write_jsonl(data.DATA / "prompts_train.jsonl", [{"prompt": p} for p in train_texts])
    data.write_jsonl(data.DATA / "prompts_heldout.jsonl", [{"prompt": p} for p in heldout])
    oracle = freeze(load_classifier(shop.folder / "oracle"))
    score = rewards.oracle_score(oracle, tokenizer)

    def written(texts, salt):
        ids = tokens.encode(tokenizer, texts)
        responses = sample(policy, ids, eos_id=end, max_tokens=LONGEST_RESPONSE, seed=seed + salt)
        return responses, tokens.decode_responses(tokenizer, responses), score(ids, responses)

    texts = train_texts[:DEMONSTRATIONS]
    responses, completions, _ = written(texts, 1)
    rows = [
        {"prompt": p, "completion": c}
        for p, c, r in zip(texts, completions, responses, strict=True)
        if r[-1] == end
    ]
    data.write_jsonl(data.DATA / "demonstrations.jsonl", rows)
    texts = train_texts[-COMPLETION_PROMPTS:]
    responses, completions, values = written([p for p in texts for _ in range(4)], 2)
    rows = data.completion_rows(texts, completions, values, [len(r) for r in responses])
    data.write_jsonl(data.DATA / "completions.jsonl", rows)


def build_reward(shop: Workshop, config: TrainConfig = REWARD) -> None:
    """The shipped reward model: from SFT, on noise-free comparisons of its own samples, checked on held-out prompts."""
    started, tokenizer, seed = time.monotonic(), shop.tokenizer, shop.seed
    policy = load_policy(shop.folder / "sft")
    score = rewards.oracle_score(freeze(load_classifier(shop.folder / "oracle")), tokenizer)

    def comparisons(texts, salt):
        ids = [i for i in tokens.encode(tokenizer, texts) for _ in range(4)]
        responses = sample(
            policy, ids, eos_id=tokenizer.eos_token_id, max_tokens=LONGEST_RESPONSE, seed=seed + salt
        )
        words, values = tokens.decode_responses(tokenizer, responses), score(ids, responses)
        rows = data.completion_rows(texts, words, values, [len(r) for r in responses])
        return tokenize_pairs(data.all_pairs(rows), tokenizer)

    train_pairs = comparisons(data.shipped_prompts("train")[:REWARD_PROMPTS], 3)
    heldout_pairs = comparisons(data.shipped_prompts("heldout"), 4)
    model = classifier_from(policy, labels=1, seed=seed).requires_grad_(True)
    train_reward_model(
        model, train_pairs, tokenizer=tokenizer, config=config, batch_size=96, folder=shop.folder / "reward.run",
        progress=shop.progress.update,
    )  # fmt: skip
    values = rewards.reward_model_score(model, tokenizer)(heldout_pairs.prompts, heldout_pairs.responses)
    card = {
        "what": "reward model: trained on comparisons of SFT samples labelled by the oracle",
        "training_pairs": len(train_pairs),
        "heldout_pairs": len(heldout_pairs),
        "heldout_pair_accuracy": round(pair_accuracy(model, heldout_pairs, tokenizer), 4),
        "mean": round(float(values.mean()), 5),  # of SFT samples; subtract it and divide by std before PPO
        "std": round(float(values.std()), 5),
    }
    shop.finish("reward", model, card, started)


STAGES = {
    "tokenizer": build_tokenizer,
    "base": build_base,
    "sft": build_sft,
    "oracle": build_oracle,
    "prompts": build_prompts,
    "reward": build_reward,
}


def build(
    folder: Path, stages: list[str], *, source: str | None, seed: int, threads: int | None = None
) -> None:
    if unknown := [s for s in stages if s not in STAGES]:
        raise UserError(f"unknown stage {unknown[0]!r}: use some of {', '.join(STAGES)}")
    set_threads(threads)
    shop = Workshop(folder, source, seed)
    for name in set(STAGES) - set(stages or STAGES):
        shop.progress.skip(name)
    for name in stages or STAGES:
        done = data.DATA / "completions.jsonl" if name == "prompts" else shop.folder / name
        if done.exists():
            print(f"{name}: already at {done}; delete it to build it again")
            shop.progress.skip(name)
            continue
        shop.progress.start(name)
        STAGES[name](shop)
        shop.progress.finish()
