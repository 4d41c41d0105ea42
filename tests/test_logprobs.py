"""Log-probs of responses: arithmetic on paper, the shift by one, nothing leaks in from prompt or padding."""

import math

import pytest
import torch

from rlhf_edu.logprobs import response_logps, token_logps


def example(dtype=torch.float64):
    """Two sequences of 6 tokens over 5 words: prompts of 2 and 1 tokens, responses of 3 and 5, one pad."""
    logits = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.tensor([[0, 3, 1, 4, 2, 0], [1, 1, 2, 3, 4, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    return logits, ids, mask


def by_hand(logits, ids, mask):
    """The definition, in Python floats: sum over masked t of log softmax(logits[t - 1])[ids[t]]."""
    sums = []
    for row, tokens, kept in zip(logits.tolist(), ids.tolist(), mask.tolist(), strict=True):
        total = 0.0
        for t in range(len(tokens)):
            if kept[t]:
                total += row[t - 1][tokens[t]] - math.log(sum(math.exp(v) for v in row[t - 1]))
        sums.append(total)
    return sums


def test_two_tokens_by_hand():
    """Word 1 of logits [0, ln 3] has probability 3/4, word 0 of [ln 4, 0] has 4/5: the sum is ln .6."""
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [50.0, -50.0]]], dtype=torch.float64)
    ids, mask = torch.tensor([[1, 1, 0]]), torch.tensor([[False, True, True]])
    sums, lengths = response_logps(logits, ids, mask)
    assert sums.item() == pytest.approx(math.log(0.6), rel=1e-14)
    assert lengths.tolist() == [2]
    assert token_logps(logits, ids).tolist() == [pytest.approx([math.log(0.75), math.log(0.8)])]


def test_against_the_definition():
    logits, ids, mask = example()
    sums, lengths = response_logps(logits, ids, mask)
    assert sums.tolist() == pytest.approx(by_hand(logits, ids, mask), rel=1e-13)
    assert lengths.tolist() == [3, 5] and not lengths.is_floating_point()
    tokens = token_logps(logits, ids)
    assert tokens.shape == (2, 5)
    torch.testing.assert_close((tokens * mask[:, 1:]).sum(1), sums)


def test_probabilities_sum_to_one():
    """Over all words at one position: the log-probs are normalised."""
    logits, ids, _ = example()
    total = sum(token_logps(logits, torch.full_like(ids, word)).exp() for word in range(5))
    torch.testing.assert_close(total, torch.ones(2, 5, dtype=torch.float64))


def test_gradient_against_finite_differences():
    logits, ids, mask = example()
    inputs = logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: response_logps(x, ids, mask)[0], (inputs,), atol=1e-8, rtol=1e-6
    )
    assert torch.autograd.gradcheck(lambda x: token_logps(x, ids), (inputs,), atol=1e-8, rtol=1e-6)


def test_only_the_logits_before_a_response_token_count():
    """The gradient is nonzero at t - 1 for every response token t, and exactly zero everywhere else."""
    logits, ids, mask = example()
    logits.requires_grad_()
    response_logps(logits, ids, mask)[0].sum().backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.tolist() == torch.cat([mask[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], dim=1).tolist()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_padding_does_not_leak(poison):
    """Whatever stands in prompt and padding, -100 and NaN included: same sums, same gradient, no NaN."""
    logits, ids, mask = example()
    clean = logits.clone().requires_grad_()
    expected, _ = response_logps(clean, ids, mask)
    expected.sum().backward()

    predicts = torch.cat([mask[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    poisoned = logits.clone().masked_fill(~predicts.unsqueeze(-1), poison).requires_grad_()
    sums, lengths = response_logps(poisoned, ids.masked_fill(~mask, -100), mask)
    sums.sum().backward()
    assert torch.equal(sums, expected) and lengths.tolist() == [3, 5]
    assert torch.equal(poisoned.grad, clean.grad)


def test_padding_on_either_side_changes_nothing():
    logits, ids, mask = example()
    expected = response_logps(logits, ids, mask)
    for left, right in ((2, 0), (0, 3)):
        padded = (
            torch.nn.functional.pad(logits, (0, 0, left, right), value=7.0),
            torch.nn.functional.pad(ids, (left, right)),
            torch.nn.functional.pad(mask, (left, right)),
        )
        for got, want in zip(response_logps(*padded), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_a_forbidden_token_costs_infinity_at_its_own_response_only():
    logits, ids, mask = example()
    logits[0, 2, ids[0, 3]] = -math.inf
    sums, _ = response_logps(logits, ids, mask)
    assert sums[0] == -math.inf and sums[1].isfinite()


def test_empty_response_has_length_zero():
    """The losses that divide refuse it by name; a sum of nothing is 0."""
    logits, ids, mask = example()
    mask[0] = False
    sums, lengths = response_logps(logits, ids, mask)
    assert sums[0] == 0 and lengths.tolist() == [0, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    """The result is that of the rounded logits in full precision; a bfloat16 softmax has 3 digits."""
    logits, ids, mask = example(dtype)
    sums, _ = response_logps(logits, ids, mask)
    assert sums.dtype == torch.float32 and token_logps(logits, ids).dtype == torch.float32
    assert sums.tolist() == pytest.approx(by_hand(logits.double(), ids, mask), rel=1e-6)


def test_dtypes_and_masks():
    """float64 stays float64, float32 stays float32; a mask of 0 and 1 does as well as one of booleans."""
    logits, ids, mask = example()
    assert response_logps(logits, ids, mask)[0].dtype == torch.float64
    assert response_logps(logits.float(), ids, mask)[0].dtype == torch.float32
    for other in (mask.long(), mask.float()):
        assert torch.equal(response_logps(logits, ids, other)[0], response_logps(logits, ids, mask)[0])


def test_large_logits_do_not_overflow():
    logits, ids, mask = example(torch.float32)
    assert response_logps(logits * 1e4, ids, mask)[0].isfinite().all()


def test_mistakes_get_one_sentence():
    logits, ids, mask = example()
    first = mask.clone()
    first[1, 0] = True
    mistakes = [
        (lambda: response_logps(logits, ids, first), ("response_logps", "position 0")),
        (lambda: response_logps(logits[:, :-1], ids, mask), ("response_logps", "(2, 5, 5)", "(2, 6)")),
        (lambda: response_logps(logits, ids, mask[:, 1:]), ("response_logps", "(2, 5)")),
        (lambda: response_logps(logits[0], ids[0], mask[0]), ("response_logps", "(6, 5)")),
        (lambda: token_logps(logits, ids[:, 1:]), ("token_logps", "(2, 5)")),
    ]
    for call, words in mistakes:
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
