"""The reward model: learns a preference, reads the last token wherever it stands, and can be loaded by others."""

import copy
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_edu import models, tokens
from rlhf_edu.pairs import tokenize_pairs
from rlhf_edu.reward_model import pair_accuracy, train_reward_model
from rlhf_edu.rewards import oracle_score, reward_model_score
from rlhf_edu.training import TrainConfig


@pytest.fixture
def reward_model(trained_policy):
    return models.classifier_from(trained_policy, labels=1, seed=3)


@pytest.fixture
def sequences(demonstrations):
    prompts, responses = demonstrations
    order = random.Random(0).sample(range(len(prompts)), 40)
    return [prompts[i] for i in order], [responses[i] for i in order]


def test_learns_the_preference(reward_model, tokenizer, comparisons):
    """Held out is one of the five prompts: praise and blame are worded alike there."""
    train, heldout = comparisons.select(range(16)), comparisons.select(range(16, 20))
    config = TrainConfig(steps=25, learning_rate=5e-3)
    metrics = train_reward_model(reward_model, train, tokenizer=tokenizer, config=config, batch_size=16)
    assert metrics["loss"].iloc[-1] < 0.3 < metrics["loss"].iloc[0]
    assert metrics["accuracy"].iloc[-1] == 1.0
    assert metrics["margin"].iloc[-1] > 1
    assert pair_accuracy(reward_model, heldout, tokenizer) == 1.0
    swapped = heldout.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert pair_accuracy(reward_model, swapped, tokenizer) == 0.0


def test_first_loss_is_that_of_the_scores(reward_model, tokenizer, comparisons):
    before = copy.deepcopy(reward_model)
    config = TrainConfig(steps=1, learning_rate=1e-3)
    metrics = train_reward_model(reward_model, comparisons, tokenizer=tokenizer, config=config, batch_size=20)
    pairs = tokenize_pairs(comparisons, tokenizer)
    scores = torch.tensor(reward_model_score(before, tokenizer)(pairs.prompts, pairs.responses))
    margin = scores[pairs.chosen] - scores[pairs.rejected]
    assert metrics["loss"][0] == pytest.approx(torch.nn.functional.softplus(-margin).mean().item(), abs=1e-5)
    assert metrics["accuracy"][0] == pytest.approx((margin > 0).double().mean().item())
    assert margin.std() > 0.1


def test_reads_the_last_token_which_is_eos(reward_model, tokenizer, sequences):
    scores = reward_model_score(reward_model, tokenizer)(*sequences)
    for prompt, response, score in zip(*sequences, scores, strict=True):
        with torch.no_grad():
            hidden = reward_model.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        assert response[-1] == tokenizer.eos_token_id
        assert score == pytest.approx(reward_model.score(hidden[-1]).item(), abs=1e-5)
    assert scores.std() > 0.1, "all alike: the test could not tell"


def test_same_score_alone_and_in_a_batch(reward_model, tokenizer, sequences):
    score = reward_model_score(reward_model, tokenizer)
    together = score(*sequences)
    padded = score([*sequences[0], [5] * 30], [*sequences[1], [6] * 30])[:-1]
    alone = [score([p], [r])[0] for p, r in zip(*sequences, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert padded == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_reloaded_by_transformers_gives_the_same_scores(reward_model, tokenizer, sequences, tmp_path, half):
    models.save_model(reward_model, tokenizer, tmp_path / "reward", half=half)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert theirs.dtype == torch.float32 and theirs.config.num_labels == 1
    expected = reward_model_score(reward_model, tokenizer)(*sequences)
    again = reward_model_score(models.load_classifier(tmp_path / "reward", "cpu"), tokenizer)(*sequences)
    assert again == pytest.approx(expected, abs=2e-2 if half else 1e-6)
    batch = tokens.collate(*sequences, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert logits.tolist() == pytest.approx(again.tolist(), abs=1e-5)


def test_starts_from_the_policy_and_its_own_head(trained_policy, tokenizer):
    model, twin, other = (models.classifier_from(trained_policy, labels=1, seed=s) for s in (3, 3, 4))
    for p, q in zip(model.base_model.parameters(), trained_policy.base_model.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    assert torch.equal(model.score.weight, twin.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    head = torch.cat([models.classifier_from(trained_policy, 1, s).score.weight.detach() for s in range(60)])
    assert head.std() == pytest.approx(33**-0.5, rel=0.1)  # N(0, 1/(d + 1)), Ziegler et al. 2019


def test_policy_without_padding_token_as_on_the_hub(trained_policy, tokenizer, sequences):
    """GPT-2 has no padding token; its tokenizer pads with EOS here, and batches must work all the same."""
    trained_policy.config.pad_token_id = None
    model = models.classifier_from(trained_policy, labels=1, seed=0)
    hub_tokenizer = copy.deepcopy(tokenizer)
    hub_tokenizer.pad_token = hub_tokenizer.eos_token
    score = reward_model_score(model, hub_tokenizer)
    alone = [score([p], [r])[0] for p, r in zip(*sequences, strict=True)]
    assert score(*sequences) == pytest.approx(alone, abs=1e-5)


def test_oracle_reads_text_without_eos(trained_policy, tokenizer, sequences):
    """A text that ended and the same text that was cut off are judged alike; the result is a probability."""
    oracle = models.classifier_from(trained_policy, labels=2, seed=0)
    score = oracle_score(oracle, tokenizer)
    prompts, responses = sequences
    with_end, without = score(prompts, responses), score(prompts, [r[:-1] for r in responses])
    assert with_end.tolist() == without.tolist()
    assert ((with_end > 0) & (with_end < 1)).all()
    with torch.no_grad():
        logits = oracle(torch.tensor([[*prompts[0], *responses[0][:-1]]])).logits[0]
    assert with_end[0] == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-6)
    assert oracle.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
