"""Judges: exact, simulated with known biases, a local model; order of presentation."""

import numpy as np
import pytest
from scipy.special import expit

from rlhf_edu.judges import (
    TEMPLATES,
    both_orders,
    concise_judge,
    in_random_order,
    language_model_judge,
    order_effect,
    rule_judge,
    score_judge,
    simple_judge,
    simulated_judge,
)


def letters(prompts, responses):
    return np.array([float(r.count("g")) for r in responses])


def always_first(prompts, first, second):
    return np.ones(len(prompts))


def test_score_and_rule_judges():
    texts = (["p"] * 3, ["gg", "g", ""], ["g", "g", "gg"])
    assert score_judge(letters)(*texts).tolist() == [1, 0.5, 0]
    assert score_judge(letters, margin=1)(*texts).tolist() == [0.5, 0.5, 0]
    rule = rule_judge(lambda prompt, response: -len(response) if prompt == "short" else len(response))
    assert rule(["short", "long"], ["aa", "aa"], ["a", "a"]).tolist() == [0, 1]


@pytest.mark.parametrize("where", [0.0, 0.7])
def test_simulated_judge_has_the_biases_it_states(where):
    n = 4000
    prompts = [f"p{i}" for i in range(n)]
    first, second = (
        [f"g{i:04}xx" for i in range(n)],
        [f"{i:04}" for i in range(n)],
    )  # one g and three letters more
    judge = simulated_judge(letters, temperature=2.0, per_token=0.1, first_bonus=where)
    expected = expit(1 / 2 + 0.1 * 3 + where)
    assert judge(prompts, first, second).mean() == pytest.approx(expected, abs=0.03)


def test_the_same_question_has_the_same_answer():
    prompts, first, second = list("abcdef"), ["g"] * 6, ["gx"] * 6
    judge = simulated_judge(letters, temperature=5.0)
    whole = judge(prompts, first, second)
    assert judge(prompts[3:], first[3:], second[3:]).tolist() == whole[3:].tolist()
    assert set(whole) <= {0.0, 1.0}
    by_ids = simulated_judge(lambda p, r: np.array([len(x) for x in r]))
    assert by_ids([[1]], [[2, 3]], [np.array([4])]).shape == (1,)


def test_the_simple_judge_likes_length_more_than_the_concise_one():
    n = 2000
    prompts = [f"p{i}" for i in range(n)]
    long, short = [f"{i:020}" for i in range(n)], [f"{i:010}" for i in range(n)]
    rates = [both_orders(j(letters))(prompts, long, short).mean() for j in (simple_judge, concise_judge)]
    assert rates[0] > rates[1] + 0.05 and rates[1] > 0.5


def test_orders():
    prompts = [f"p{i}" for i in range(2000)]
    first, second = ["g"] * 2000, [""] * 2000
    assert both_orders(always_first)(prompts, first, second).tolist() == [0.5] * 2000
    assert both_orders(score_judge(letters))(prompts, first, second).tolist() == [1] * 2000
    assert in_random_order(always_first)(prompts, first, second).mean() == pytest.approx(0.5, abs=0.05)
    assert in_random_order(score_judge(letters))(prompts, first, second).tolist() == [1] * 2000
    assert order_effect(always_first, prompts, first, second) == {"consistent": 0, "favours_first": 1}
    assert order_effect(score_judge(letters), prompts, first, second) == {
        "consistent": 1,
        "favours_first": 0.5,
    }
    half_tied = both_orders(lambda p, a, b: np.array([1.0 if a[0] else 0.5]))
    assert half_tied(["p"], ["g"], [""]).tolist() == [0.5]  # a win and a tie are no agreement


def test_bad_use_is_explained(one_sentence):
    with one_sentence("2 prompts, 1 first and 1 second"):
        both_orders(always_first)(["a", "b"], ["c"], ["d"])
    with one_sentence("temperature is 0"):
        simulated_judge(letters, temperature=0)


def test_templates_are_complete():
    for template in TEMPLATES.values():
        text = template.format(prompt="{P}", first="{F}", second="{S}")  # braces in a text do no harm
        assert all(part in text for part in ("{P}", "{F}", "{S}"))
        assert text.index("{F}") < text.index("{S}") and "A or B" in text


def test_language_model_judge_reads_the_letter(trained_policy, tokenizer, monkeypatch, one_sentence):
    """Against the log-probabilities of one question at a time; a batch of several lengths changes nothing."""
    import torch

    monkeypatch.setitem(TEMPLATES, "tiny", "{prompt}: {first}|{second}")
    texts = (["The film", "The plot was"], [" was great.", " weak."], [" was awful to the end.", " funny."])
    judge = language_model_judge(trained_policy, tokenizer, TEMPLATES["tiny"])
    answers = judge(*texts)
    for p, f, s, answer in zip(*texts, answers, strict=True):
        logps = []
        for letter in (" A", " B"):
            ids = tokenizer(f"{p}: {f}|{s}\n\nThe better one is{letter}")["input_ids"]
            with torch.no_grad():
                logits = trained_policy(torch.tensor([ids])).logits[0].log_softmax(-1)
            logps.append(logits[-2, ids[-1]])
        assert answer == float(logps[0] > logps[1])
    with one_sentence("does not fit"):
        judge(["The film " * 200], [""], [""])
