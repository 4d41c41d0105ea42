"""Log-probs of a policy: the short way equals the long one, and padding, batches and order change nothing."""

import random

import pytest
import torch

from rlhf_edu.logprobs import all_logps, all_token_logps, batch_logps, batch_token_logps, response_logps
from rlhf_edu.tokens import collate


@pytest.fixture
def sequences(demonstrations):
    """(prompts, responses) of many lengths, in no order."""
    prompts, responses = demonstrations
    order = random.Random(0).sample(range(len(prompts)), 70)
    return [prompts[i] for i in order], [responses[i] for i in order]


def alone(policy, prompt, response) -> torch.Tensor:
    """Summed log-prob from the definition: one sequence, no padding, cross-entropy of torch."""
    logits = policy(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")


def test_equals_response_logps_on_full_logits(trained_policy, tokenizer, sequences):
    batch = collate(*sequences, tokenizer.pad_token_id)
    sums, lengths = batch_logps(trained_policy, batch)
    logits = trained_policy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected, expected_lengths = response_logps(logits, batch["input_ids"], batch["response_mask"])
    assert torch.equal(lengths, expected_lengths)
    assert lengths.tolist() == [len(r) for r in sequences[1]]
    assert (sums - expected).abs().max() < 1e-5


def test_equals_the_definition(trained_policy, tokenizer, sequences):
    sums = all_logps(trained_policy, tokenizer.pad_token_id, *sequences)
    with torch.no_grad():
        expected = torch.stack([alone(trained_policy, p, r) for p, r in zip(*sequences, strict=True)])
    assert (sums - expected).abs().max() < 1e-5


def test_tokens_come_in_row_order(trained_policy, tokenizer, sequences):
    pad = tokenizer.pad_token_id
    batch = collate(*sequences, pad)
    parts = batch_token_logps(trained_policy, batch).split([len(r) for r in sequences[1]])
    for mine, other in zip(all_token_logps(trained_policy, pad, *sequences), parts, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() < 1e-5


def test_batch_size_and_order_change_nothing(trained_policy, tokenizer, sequences):
    pad, (prompts, responses) = tokenizer.pad_token_id, sequences
    one = all_logps(trained_policy, pad, prompts, responses, batch_size=1)
    many = all_logps(trained_policy, pad, prompts, responses, batch_size=64)
    order = random.Random(1).sample(range(len(prompts)), len(prompts))
    shuffled = all_logps(trained_policy, pad, [prompts[i] for i in order], [responses[i] for i in order])
    assert (one - many).abs().max() < 1e-5
    assert (one[order] - shuffled).abs().max() < 1e-5
    assert one.std() > 0.1, "all alike: the test could not tell"


def test_tokens_of_a_random_policy_too(policy, tokenizer, sequences):
    """Sums of a few hundred nats have no fifth place in float32, but each of their tokens has."""
    pad = tokenizer.pad_token_id
    one = torch.cat(all_token_logps(policy, pad, *sequences, batch_size=1))
    many = torch.cat(all_token_logps(policy, pad, *sequences, batch_size=64))
    assert (one - many).abs().max() < 1e-5


def test_padding_changes_nothing(trained_policy, tokenizer, sequences):
    """A neighbour of 60 tokens pads all others; what stands under the padding does not matter either."""
    prompts, responses = sequences
    short = all_logps(trained_policy, tokenizer.pad_token_id, prompts, responses, batch_size=1)
    batch = collate([*prompts, [5] * 30], [*responses, [6] * 30], tokenizer.pad_token_id)
    assert batch["input_ids"].shape[1] == 60
    with torch.no_grad():
        padded = batch_logps(trained_policy, batch)[0][:-1]
        noise = torch.randint(len(tokenizer), batch["input_ids"].shape)
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)
        noisy = batch_logps(trained_policy, batch)[0][:-1]
    assert (short - padded).abs().max() < 1e-5
    assert (short - noisy).abs().max() < 1e-5


def test_gradients_are_equal_too(trained_policy, tokenizer, sequences):
    prompts, responses = (part[:20] for part in sequences)
    weights = torch.linspace(-1, 1, len(prompts), dtype=torch.float64)
    parameters = list(trained_policy.parameters())
    sums, _ = batch_logps(trained_policy, collate(prompts, responses, tokenizer.pad_token_id))
    batched = torch.autograd.grad(weights @ sums, parameters)
    separate = torch.autograd.grad(
        weights
        @ torch.stack(
            [alone(trained_policy, p, r) for p, r in zip(prompts, responses, strict=True)]
        ).double(),
        parameters,
    )
    assert max(g.abs().max() for g in separate) > 0.1
    for a, b in zip(batched, separate, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_no_gradient_where_none_is_wanted(trained_policy, tokenizer, sequences):
    sums = all_logps(trained_policy, tokenizer.pad_token_id, *sequences)
    assert not sums.requires_grad
    assert all_logps(trained_policy, tokenizer.pad_token_id, [], []).shape == (0,)
