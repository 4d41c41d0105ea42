"""What ships in data/ is what data/README.md says: checkpoints that work, prompts that were not trained on, results."""

import json

import numpy as np
import pandas as pd
import pytest

from rlhf_edu import data, evaluate, figures, models, rewards, tokens
from rlhf_edu.logprobs import all_logps
from rlhf_edu.pairs import tokenize_pairs
from rlhf_edu.reward_model import pair_accuracy
from rlhf_edu.sampling import sample

RESULTS = data.DATA / "results" / "mini"


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(data.MINI / "sft")


@pytest.fixture(scope="module")
def sft():
    return models.freeze(models.load_policy(data.MINI / "sft", "cpu"))


@pytest.fixture(scope="module")
def oracle(tokenizer):
    return rewards.oracle_score(models.load_classifier(data.MINI / "oracle", "cpu"), tokenizer)


def test_checkpoints_fit_into_40_megabytes_and_hold_no_pickle():
    files = [p for p in data.MINI.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 40e6
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl"}


def test_no_heldout_prompt_is_a_training_prompt():
    train, heldout = data.shipped_prompts("train"), data.shipped_prompts("heldout")
    assert len(heldout) >= 256 and len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)
    assert not set(heldout) & {c["prompt"] for c in data.shipped_completions()}


def test_prompts_have_2_to_8_tokens(tokenizer):
    lengths = {
        len(i) for s in ("train", "heldout") for i in tokens.encode(tokenizer, data.shipped_prompts(s))
    }
    assert lengths <= set(range(2, 9)) and len(lengths) > 3


def test_sft_stops_and_base_does_not(tokenizer, sft):
    prompts = tokens.encode(tokenizer, data.shipped_prompts("heldout")[:64])
    base = models.load_policy(data.MINI / "base", "cpu")
    ended = [
        np.mean(
            [
                r[-1] == tokenizer.eos_token_id
                for r in sample(m, prompts, eos_id=tokenizer.eos_token_id, max_tokens=48)
            ]
        )
        for m in (sft, base)
    ]
    assert ended[0] > 0.9 and ended[1] == 0


def test_sft_is_the_better_model_of_its_demonstrations(tokenizer, sft):
    rows = data.shipped_demonstrations()[:100]
    prompts = tokens.encode(tokenizer, rows["prompt"])
    responses = tokens.encode_responses(tokenizer, rows["completion"], max_tokens=48)
    base = models.load_policy(data.MINI / "base", "cpu")
    gain = all_logps(sft, tokenizer.pad_token_id, prompts, responses) - all_logps(
        base, tokenizer.pad_token_id, prompts, responses
    )
    assert gain.mean() > 5


def test_oracle_tells_praise_from_scorn(tokenizer, oracle):
    praise = [
        "This is one of the best films I have ever seen.",
        "A wonderful movie, I loved it and highly recommend it!",
    ]
    scorn = [
        "This is one of the worst films I have ever seen.",
        "A terrible movie, a boring waste of time and money.",
    ]
    scores = oracle(tokens.encode(tokenizer, praise + scorn), [[]] * 4)
    assert min(scores[:2]) > 0.8 and max(scores[2:]) < 0.2


def test_stored_rewards_are_the_oracles(tokenizer, oracle):
    """Up to what reading a sampled response back as text changes in its tokens."""
    rows = data.shipped_completions()[:40]
    prompts = [p for p in tokens.encode(tokenizer, [r["prompt"] for r in rows]) for _ in range(4)]
    responses = tokens.encode(tokenizer, [t for r in rows for t in r["responses"]])
    stored = np.concatenate([r["rewards"] for r in rows])
    assert np.median(np.abs(oracle(prompts, responses) - stored)) < 0.01


def test_reward_model_ranks_heldout_pairs_as_its_card_says(tokenizer):
    """The shipped completions answer training prompts, so this is an upper check; the card has the held-out figure."""
    model = models.load_classifier(data.MINI / "reward", "cpu")
    card = json.loads((data.MINI / "reward" / "card.json").read_text())
    pairs = tokenize_pairs(data.all_pairs(data.shipped_completions()[:150]), tokenizer)
    assert card["heldout_pair_accuracy"] > 0.65
    assert pair_accuracy(model, pairs, tokenizer) > card["heldout_pair_accuracy"] - 0.06


def test_padding_and_batch_size_change_no_log_prob_of_the_shipped_policy(tokenizer, sft):
    rows = data.shipped_completions()[:40]
    prompts = tokens.encode(tokenizer, [r["prompt"] for r in rows for _ in r["responses"]])
    texts = [text for r in rows for text in r["responses"]]
    responses = tokens.encode_responses(tokenizer, texts, max_tokens=48)
    alone = all_logps(sft, tokenizer.pad_token_id, prompts, responses, batch_size=1)
    for size in (7, 160):
        together = all_logps(sft, tokenizer.pad_token_id, prompts, responses, batch_size=size)
        assert (alone - together).abs().max() < 1e-5


def test_sequence_kl_of_the_reference_with_itself_is_zero(tokenizer, sft):
    prompts = tokens.encode(tokenizer, data.shipped_prompts("heldout")[:16])
    responses = sample(sft, prompts, eos_id=tokenizer.eos_token_id)
    exact, sampled = evaluate.sequence_kl(
        sft, models.copy_of(sft), prompts, responses, tokenizer.pad_token_id
    )
    assert (exact == 0).all() and (sampled == 0).all()


def test_shipped_results_have_three_seeds_and_their_settings():
    runs = json.loads((RESULTS / "runs.json").read_text())
    assert len({r["seed"] for r in runs}) >= 3
    assert all(r["scale"]["sft"] == "data/models/mini/sft" for r in runs), "a path of one machine"
    assert all("reproduce" in r["command"] and r["versions"]["torch"] for r in runs)
    for name in ("frontier", "best_of_n", "correlations", "margins_binned", "seconds"):
        assert pd.read_csv(RESULTS / f"{name}.csv")["seed"].nunique() >= 3, name


def test_length_normalization_lowers_the_correlation_with_length_over_the_shipped_seeds():
    """SimPO Figure 2b, c: the interval over seeds of the difference in rho lies above 0."""
    rho = pd.read_csv(RESULTS / "correlations.csv").pivot_table(index="seed", columns="method", values="rho")
    _, low, _ = figures.seed_interval(rho["SimPO w/o LN"] - rho["SimPO"])
    assert low > 0


def test_without_length_normalization_the_margin_is_negative_where_the_winner_is_shorter():
    """SimPO Figure 2a, in SimPO's reward, over the shipped seeds."""
    table = pd.read_csv(RESULTS / "margins_binned.csv").query("method == 'SimPO w/o LN' and bin_high <= -2.5")
    margins = [np.average(t["margin"], weights=t["n"]) for _, t in table.groupby("seed")]
    assert figures.seed_interval(margins)[2] < 0


def test_every_shipped_run_starts_at_the_sft_policy():
    frontier = pd.read_csv(RESULTS / "frontier.csv")
    start = frontier[frontier["step"] == 0]
    assert (start["kl"] == 0).all() and (start["kl_sampled"] == 0).all()
    assert start.groupby("seed")["reward"].nunique().eq(1).all()
