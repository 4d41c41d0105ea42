"""Judges of pairs of responses: exact, simulated with known biases, or a local language model.

A judge is any function (prompts, first, second) -> (n,) array: 1 where it prefers the first response, 0 where the
second, 0.5 for a tie. The three lists have one entry a comparison, all texts or all lists of token ids, as the judge
wants them. `judge_endpoint` holds one more, behind an HTTP interface; `both_orders` works on each of them.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import expit

from .errors import UserError, numbers
from .rewards import Score
from .training import rng

Judge = Callable[[Sequence, Sequence, Sequence], np.ndarray]

# What a language model is asked. The DPO paper's judges (App. C.2) differ in one clause, as "simple" and "concise" do.
_FORM = """Two {what} are shown below. {question}

{given}:
{{prompt}}

{what_one} A:
{{first}}

{what_one} B:
{{second}}

First compare them in one sentence. Then write a line with nothing but the letter of the better one: A or B."""
_POST = {"what": "summaries of one forum post", "what_one": "Summary", "given": "Post"}
TEMPLATES = {
    "simple": _FORM.format(question="Which of them tells the main points of the post better?", **_POST),
    "concise": _FORM.format(
        question="Which of them tells the main points of the post better and leaves out what is beside the point? "
        "A good summary is exact and short.",
        **_POST,
    ),
    "helpful": _FORM.format(
        question="Which of them helps the user more?",
        what="answers to one message of a user",
        what_one="Answer",
        given="Message",
    ),
    "review": _FORM.format(
        question="Which of them makes the review more favourable to the film?",
        what="ways to go on with one film review",
        what_one="Text",
        given="Beginning",
    ),
}


def score_judge(score: Score, *, margin: float = 0.0) -> Judge:
    """Prefers the higher score: the oracle (`Lesson.true_score`), a reward model, any rule. No order matters to it.

    margin: scores no further apart than this are a tie.
    """

    def judge(prompts, first, second):
        _check(prompts, first, second)
        difference = numbers("scores", score(prompts, first)) - numbers("scores", score(prompts, second))
        return np.where(np.abs(difference) <= margin, 0.5, (difference > 0).astype(float))

    return judge


def rule_judge(rule: Callable[[object, object], float]) -> Judge:
    """Exact, from a rule (prompt, response) -> points, e.g. the share of a post's facts that a summary has right."""
    return score_judge(lambda prompts, responses: np.array([rule(*x) for x in zip(prompts, responses)]))


def simulated_judge(
    score: Score, *, temperature: float = 0.1, per_token: float = 0.0, first_bonus: float = 0.0, seed: int = 0
) -> Judge:
    """A judge with known faults: first wins with probability sigmoid(score difference / temperature + biases).

    per_token: what one more token (of a text: one more character) is worth, in logits. first_bonus: what standing
    first is worth. The noise of a comparison depends on the seed and on what is compared in which order, never on
    the rest of the batch, so that the same question always has the same answer.
    """
    if temperature <= 0:
        raise UserError(f"a simulated judge's temperature is {temperature}: take more than 0, or score_judge")

    def judge(prompts, first, second):
        _check(prompts, first, second)
        scores = numbers("scores", score(prompts, first)) - numbers("scores", score(prompts, second))
        lengths = np.array([len(a) - len(b) for a, b in zip(first, second)], dtype=float)
        p = expit(scores / temperature + per_token * lengths + first_bonus)
        noise = [_uniform(seed, *comparison) for comparison in zip(prompts, first, second)]
        return (np.array(noise) < p).astype(float)

    return judge


def simple_judge(score: Score, *, seed: int = 0) -> Judge:
    """Stands in for GPT-4 asked only for the better summary: ten tokens more are worth 0.6 logits."""
    return simulated_judge(score, per_token=0.06, first_bonus=0.3, seed=seed)


def concise_judge(score: Score, *, seed: int = 0) -> Judge:
    """Stands in for the same judge asked for concision too: ten tokens more are worth 0.1 logits."""
    return simulated_judge(score, per_token=0.01, first_bonus=0.3, seed=seed)


def in_random_order(judge: Judge, seed: int = 0) -> Judge:
    """The same judge, shown each pair in an order drawn at random (DPO, section 6): its liking for the first place
    becomes noise. One question a pair."""

    def ask(prompts, first, second):
        _check(prompts, first, second)
        swap = rng(seed, 43).random(len(prompts)) < 0.5
        shown = [(b, a) if s else (a, b) for a, b, s in zip(first, second, swap)]
        answers = _asked(judge, prompts, [a for a, _ in shown], [b for _, b in shown])
        return np.where(swap, 1 - answers, answers)

    return ask


def both_orders(judge: Judge) -> Judge:
    """The same judge asked twice, in both orders; unless it names the same winner twice, a tie (MT-Bench, 3.4)."""

    def ask(prompts, first, second):
        there, back = _both(judge, prompts, first, second)
        return np.where(there == back, there, 0.5)

    return ask


def order_effect(judge: Judge, prompts, first, second) -> dict:
    """{"consistent": share with the same answer in both orders, "favours_first": mean preference for whatever
    stands first, 0.5 without bias}."""
    there, back = _both(judge, prompts, first, second)
    if not len(there):
        raise UserError("there is nothing to compare: an order effect needs one prompt or more")
    return {
        "consistent": float(np.mean(there == back)),
        "favours_first": float(np.mean((there + 1 - back) / 2)),
    }


def language_model_judge(model, tokenizer, template: str = TEMPLATES["concise"], *, batch_size=8) -> Judge:
    """A local causal language model: prefers the first response if " A" is likelier than " B" as the next word.

    Takes texts. `template` has the fields {prompt}, {first}, {second}; the model is not asked for a comparison
    in words first, only for the letter. A chat model sees the question in its own chat template.
    """
    chat = getattr(tokenizer, "chat_template", None) is not None
    letters = [
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (("A", "B") if chat else (" A", " B"))
    ]
    shared = next(
        (n for n, pair in enumerate(zip(*letters)) if pair[0] != pair[1]), None
    )  # "Ġ" before "A", "B"
    if shared is None:
        raise UserError("this tokenizer does not tell ' A' from ' B': judge with another model")
    before, letters = letters[0][:shared], [ids[shared] for ids in letters]
    context = getattr(model.config, "n_positions", None) or getattr(
        model.config, "max_position_embeddings", 2**30
    )

    def question(prompt, first, second) -> list[int]:
        text = template.format(prompt=prompt, first=first, second=second)
        if not chat:
            return tokenizer(text + "\n\nThe better one is")["input_ids"]
        messages = [{"role": "user", "content": text + " Write the letter alone."}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written BOS already

    @torch.no_grad()
    def judge(prompts, first, second):
        _check(prompts, first, second)
        ids = [question(*x) + before for x in zip(prompts, first, second)]
        if (longest := max(map(len, ids), default=0)) > context:
            raise UserError(
                f"a question of {longest} tokens does not fit this judge's context of {context}: shorten the texts"
            )
        answers = np.zeros(len(ids))
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            width = max(map(len, batch))
            tokens = torch.tensor(
                [i + [0] * (width - len(i)) for i in batch], device=model.device
            )  # right pad
            mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in batch], device=model.device)
            logits = model(tokens, attention_mask=mask).logits
            last = logits[torch.arange(len(batch)), torch.tensor([len(i) - 1 for i in batch])].float()
            difference = (last[:, letters[0]] - last[:, letters[1]]).cpu().numpy()
            answers[start : start + batch_size] = np.where(difference == 0, 0.5, difference > 0)
        return answers

    return judge


def _both(judge: Judge, prompts, first, second) -> tuple[np.ndarray, np.ndarray]:
    """Preference for `first`, as asked in this order and in the other."""
    _check(prompts, first, second)
    return _asked(judge, prompts, first, second), 1 - _asked(judge, prompts, second, first)


def _asked(judge: Judge, prompts, first, second) -> np.ndarray:
    """The judge's answers, which may come from a function of the reader's own."""
    answers = numbers("the answers of a judge", judge(prompts, first, second))
    if answers.shape != (len(prompts),) or not ((answers >= 0) & (answers <= 1)).all():
        raise UserError(
            f"a judge answered {len(prompts)} comparisons with numbers of shape {answers.shape}: it must return one "
            "from 0 (second) to 1 (first) for each"
        )
    return answers


def _check(prompts, first, second) -> None:
    if not len(prompts) == len(first) == len(second):
        raise UserError(
            f"{len(prompts)} prompts, {len(first)} first and {len(second)} second responses: a judge needs one of "
            "each a comparison"
        )


def _uniform(*what) -> float:
    """A number in [0, 1) that looks random and is the same for the same question."""
    key = repr([list(x) if isinstance(x, (list, tuple, np.ndarray)) else x for x in what])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
