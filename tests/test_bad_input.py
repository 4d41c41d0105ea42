"""Nonsense into the public functions and file readers: a right value or one sentence of ours comes out, nothing else.

Losses, log-probs, tokens, sampling, advantages, files, labels, training; the rest is in test_bad_input_evaluation.py.
Inputs are drawn by hypothesis, the same ones on every run.
"""

import contextlib
import inspect
import json
import math

import numpy as np
import pytest
import torch
from nonsense import NAN, REFUSED, Cases, junk, number, result, st, text

from rlhf_edu import (
    advantages,
    agreement,
    checks,
    data,
    editions,
    evaluate,
    grading,
    labelling,
    logprobs,
    losses,
    pairs,
    sampling,
    tables,
    tokens,
    training,
    win_rates,
)  # fmt: skip

cases = Cases()


def finite(value) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


# --- losses -----------------------------------------------------------------------------------------------------

LOSSES = [f for n, f in vars(losses).items() if n.endswith("_loss") and inspect.isfunction(f)]
SCALARS = {
    "beta",
    "tau",
    "alpha",
    "gamma",
    "delta",
    "nll_weight",
    "weight",
    "clip",
    "label_smoothing",
    "reference_point",
}
SCALARS |= {"desirable_weight", "undesirable_weight"}


@st.composite
def loss_calls(draw):
    """A loss and arguments of it: mostly right, one or two of them spoilt."""
    loss = draw(st.sampled_from(LOSSES))
    size = draw(st.integers(1, 4))
    shape = (size, 3) if loss is losses.reward_ranking_loss else (size,)
    seed = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arguments = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if name.endswith("lengths"):
            arguments[name] = torch.tensor(seed.integers(1, 60, shape))
        elif name not in SCALARS and parameter.default is parameter.empty:
            arguments[name] = torch.tensor(-seed.exponential(10, shape) - 1e-3)
    kind = draw(
        st.sampled_from(
            ["right", "scalar", "shape", "junk", "nan", "zero length", "dtype", "ties", "extreme"]
        )
    )
    tensors = list(arguments)
    target = draw(st.sampled_from(tensors))
    if kind == "scalar":
        known = [n for n in inspect.signature(loss).parameters if n in SCALARS]
        if known:
            arguments[draw(st.sampled_from(known))] = draw(
                st.one_of(number, st.sampled_from([None, "0.1", True]))
            )
    elif kind == "shape":
        arguments[target] = torch.zeros(
            draw(st.sampled_from([(), (0,), (1, 1), (size + 1,), (size, 1), (2, 3, 4)]))
        )
    elif kind == "junk":
        arguments[target] = draw(junk)
    elif kind == "nan":
        if not target.endswith("lengths"):
            arguments[target][draw(st.integers(0, size - 1))] = NAN
    elif kind == "zero length" and any(n.endswith("lengths") for n in tensors):
        target = next(n for n in tensors if n.endswith("lengths"))
        arguments[target][draw(st.integers(0, size - 1))] = draw(st.sampled_from([0, -1]))
    elif kind == "dtype":
        arguments[target] = arguments[target].to(
            draw(st.sampled_from([torch.int64, torch.float32, torch.bool, torch.complex64]))
        )
    elif kind == "ties":
        arguments |= {n: torch.full(shape, -2.0) for n in tensors if not n.endswith("lengths")}
    elif kind == "extreme":
        arguments |= {n: arguments[n] * 1e4 for n in tensors if not n.endswith("lengths")}
    return kind, loss, arguments


@cases(420, call=loss_calls())
def test_losses(call):
    kind, loss, arguments = call
    value = result(loss, **arguments)
    if kind in ("right", "ties"):
        assert value is not REFUSED and finite(value), (loss.__name__, value)
    elif kind == "zero length" and any(n.endswith("lengths") for n in arguments):
        assert value is REFUSED, loss.__name__
    elif kind == "nan" and value is not REFUSED:  # a NaN is seen, in its own row and in no other
        bad = torch.stack([a.reshape(len(a), -1).isnan().any(1) for a in arguments.values()]).any(0)
        assert torch.equal(value.isnan(), bad), (loss.__name__, arguments, value)
    elif value is not REFUSED and kind != "extreme" and loss is not losses.ppo_policy_loss:
        assert not value.isnan().any(), (loss.__name__, arguments, value)


# --- log-probs and tokens ---------------------------------------------------------------------------------------


@st.composite
def scorings(draw):
    batch, time, vocabulary = draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = torch.randn(batch, time, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (batch, time), generator=generator)
    mask = torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    if time:
        mask[:, 0] = draw(st.booleans()) and draw(st.booleans())
    kind = draw(
        st.sampled_from(["right", "ids", "ids outside", "nan outside", "nan", "shape", "junk", "int"])
    )
    if kind == "ids" and ids.numel():
        ids = torch.full_like(ids, draw(st.sampled_from([-100, vocabulary, 10**9])))
    if kind == "ids outside":
        ids = ids.masked_fill(~mask, -100)
    if kind == "nan outside" and time:
        before = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        logits = logits.masked_fill(~before[..., None], NAN)
    if kind == "nan":
        logits = logits * NAN
    if kind == "shape":
        ids = draw(st.sampled_from([ids[:, :-1], ids[..., None], torch.zeros(0, dtype=torch.int64)]))
    if kind == "junk":
        ids = draw(junk)
    if kind == "int":
        logits = logits.long()
    return kind, logits, ids, mask


@cases(250, scoring=scorings())
def test_response_logps(scoring):
    kind, logits, ids, mask = scoring
    value = result(logprobs.response_logps, logits, ids, mask)
    if value is REFUSED:
        assert kind not in ("right", "ids outside", "nan outside") or logits.shape[1] == 0 or mask[:, 0].any()
        return
    sums, lengths = value
    assert torch.equal(lengths, mask[:, 1:].sum(1))
    assert not sums[lengths == 0].any(), "an empty response has log-prob 0"
    if kind == "nan":
        assert sums[lengths > 0].isnan().all(), "a NaN must be seen"
    else:
        assert finite(sums)
        assert kind != "ids" or not (lengths > 0).any(), "an id outside the vocabulary has no log-prob"


@cases(80, scoring=scorings())
def test_token_logps(scoring):
    kind, logits, ids, _ = scoring
    value = result(logprobs.token_logps, logits, ids)
    assert value is REFUSED or kind == "nan" or finite(value) or kind == "nan outside"


@cases(150, texts=st.lists(text, max_size=4), most=st.integers(-1, 6), bad=st.one_of(st.none(), junk))
def test_encode_and_decode(tokenizer, texts, most, bad):
    given_texts = [*texts, bad] if bad is not None else texts
    ids = result(tokens.encode, tokenizer, given_texts)
    if bad is not None and not isinstance(bad, str):
        assert ids is REFUSED
        return
    if ids is REFUSED:
        assert any("\ud800" <= c <= "\udfff" for t in texts for c in t)
        return
    assert tokens.decode_responses(tokenizer, ids) == given_texts
    responses = result(tokens.encode_responses, tokenizer, given_texts, max_tokens=most)
    assert (responses is REFUSED) == (most < 1)
    if most >= 1:
        assert all(1 <= len(r) <= most for r in responses)


rows_of_ids = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4)


@cases(120, prompts=rows_of_ids, responses=rows_of_ids)
def test_collate(prompts, responses):
    batch = result(tokens.collate, prompts, responses, 0)
    right = len(prompts) == len(responses) > 0 and all(prompts)
    assert (batch is not REFUSED) == right
    if right:
        assert batch["response_mask"].sum(1).tolist() == [len(r) for r in responses]
        assert batch["attention_mask"].sum(1).tolist() == [
            len(p) + len(r) for p, r in zip(prompts, responses, strict=True)
        ]


@cases(30, ids=st.lists(st.sampled_from([0, 5, 300, 319, 320, 10**6, -1]), min_size=1, max_size=5))
def test_a_policy_and_the_ids_of_another_tokenizer(policy, ids):
    size = policy.config.vocab_size
    batch = tokens.collate([ids], [[1]], 0)
    value = result(logprobs.batch_logps, policy, batch)
    known = all(0 <= i < size for i in ids)
    assert (value is not REFUSED) == known
    sampled = result(sampling.sample, policy, [ids], eos_id=0, max_tokens=1)
    assert (sampled is not REFUSED) == known


# --- sampling ---------------------------------------------------------------------------------------------------


@cases(
    120, temperature=st.one_of(number, junk), top_p=st.sampled_from([1.0, 0.5, 0.0, -1, 2, NAN, None]),
    most=st.sampled_from([1, 3, 0, -2, 1000, None, 2.5]), prompts=st.sampled_from([[[5]], [[5], [6, 7]], [], [[]], [[5] * 70]]),
)  # fmt: skip
def test_sampling_arguments(policy, temperature, top_p, most, prompts):
    value = result(
        sampling.sample, policy, prompts, eos_id=0, temperature=temperature, top_p=top_p, max_tokens=most
    )
    if value is not REFUSED:
        assert len(value) == len(prompts) and all(1 <= len(r) <= most for r in value)


def test_a_policy_of_nan_is_not_sampled(policy, one_sentence):
    with torch.no_grad():
        policy.base_model.ln_f.weight.fill_(NAN)
    with one_sentence("NaN"):
        sampling.sample(policy, [[5]], eos_id=0)


# --- advantages -------------------------------------------------------------------------------------------------


@st.composite
def token_tables(draw):
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = mask.sort(dim=1, descending=True).values  # padding stands on the right
    kind = draw(st.sampled_from(["right", "nan outside", "nan", "shape", "junk", "scalar"]))
    if kind == "nan outside":
        first = first.masked_fill(~mask, NAN)
    if kind == "nan":
        first = first * NAN
    if kind == "shape":
        second = draw(st.sampled_from([second[:, :-1], second[0:1, 0:0], second.T[..., None]]))
    if kind == "junk":
        second = draw(junk)
    if kind == "scalar":
        first, second, mask = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(True)
    return kind, first, second, mask


@cases(120, table=token_tables())
def test_gae(table):
    kind, rewards, values, mask = table
    value = result(advantages.gae, rewards, values, mask=mask)
    assert value is not REFUSED or kind in ("shape", "junk", "scalar") or not rewards.numel()
    if value is not REFUSED and kind != "nan":
        assert finite(value[0]) and finite(value[1]) and not value[0][~mask].any()


@cases(100, table=token_tables())
def test_kl_estimates_and_whiten(table):
    kind, logps, other, mask = table
    value = result(advantages.kl_estimates, logps, other)
    assert value is not REFUSED or kind in ("shape", "junk")
    value = result(advantages.whiten, other, mask)
    assert value is not REFUSED or kind in ("shape", "junk") or not mask.any()
    if value is not REFUSED:
        assert finite(value)


@cases(60, start=st.tuples(number, number, number), kl=st.one_of(number, junk))
def test_the_adaptive_coefficient_stays_a_number(start, kl):
    adaptive = result(advantages.AdaptiveKL, *start)
    if adaptive is not REFUSED:
        result(adaptive.update, kl, 8)
        assert math.isfinite(adaptive.coefficient), (start, kl)


# --- evaluate and agreement -------------------------------------------------------------------------------------


@cases(100, values=st.lists(number, max_size=5), wins=st.one_of(st.lists(number, max_size=4), junk))
def test_means_and_win_rates(values, wins):
    value = result(evaluate.mean_and_error, values)
    assert (value is REFUSED) == (not values or not all(map(math.isfinite, values)))
    if value is not REFUSED:
        assert math.isfinite(value[0]) and math.isfinite(value[1]) == (len(values) > 1)
    value = result(win_rates.win_rate, wins)
    assert value is REFUSED or 0 <= value <= 100


@cases(
    80,
    shape=st.tuples(st.integers(0, 3), st.integers(0, 4)),
    ns=st.lists(st.integers(-1, 5), max_size=3),
    bad=number,
)
def test_best_of_n(shape, ns, bad):
    rewards = np.zeros(shape)
    rewards[:1, :1] = bad
    value = result(evaluate.best_of_n, rewards, ns)
    right = all(shape) and ns and all(1 <= n <= shape[1] for n in ns) and math.isfinite(bad)
    assert (value is not REFUSED) == bool(right)
    if right:
        assert np.isfinite(value["reward"]).all()


label = st.sampled_from(["A", "B", "tie", None, NAN, 0, True])


@cases(
    200,
    raters=st.lists(st.lists(label, max_size=5), max_size=4),
    ties=st.sampled_from(["count", "drop", "x"]),
)
def test_agreement(raters, ties):
    for function in (agreement.percent_agreement, agreement.fleiss_kappa):
        value = result(function, *raters, ties=ties)
        assert (
            value is not REFUSED
            or ties == "x"
            or len(raters) < 2
            or len({len(r) for r in raters}) > 1
            or not any(
                all(not agreement._missing(x) for x in item) and not (ties == "drop" and "tie" in item)
                for item in zip(*raters, strict=True)
            )
        )
        if value is not REFUSED and not math.isnan(value.value):
            assert -1 <= value.value <= 1 and str(value)
    if len(raters) == 2:
        value = result(agreement.cohen_kappa, *raters, ties=ties)
        assert value is REFUSED or math.isnan(value.value) or -1 <= value.value <= 1


@cases(40, bad=junk, share=st.tuples(number, number))
def test_agreement_of_what_is_no_list_of_labels(bad, share):
    result(agreement.percent_agreement, bad, ["A"])
    result(agreement.percent_agreement, [bad], [bad])
    value = result(agreement.wilson, *share)
    assert value is REFUSED or 0 <= value[0] <= value[1] <= 1


# --- files ------------------------------------------------------------------------------------------------------

damage = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\n", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff\xfe\x00", b"a,b\n1,2", b"a,b\n1\n", b"a,b\n,\n",
                     b'"', b"a\x00b,c\n1,2\n", b"[" * 5000, b'{"a": ' * 3000, b"1" * 6000, "a,b\né,\u202e\n".encode()]),
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file"


@cases(250, content=damage)
def test_files_of_noise(file, content):
    file.write_bytes(content)
    table = result(tables.read_csv, file, ["a", "b"])
    assert table is REFUSED or len(table) and np.isfinite(table[["a", "b"]].to_numpy(dtype=float)).all(), (
        content
    )
    value = result(tables.read_json, file, ["a"])
    assert value is REFUSED or "a" in value
    rows = result(data.read_jsonl, file, ["a"])
    assert rows is REFUSED or all("a" in r for r in rows)
    assert result(data.read_completions, file) is REFUSED
    assert result(editions.read, file) is REFUSED
    result(grading.scores_by_hand, file)


@cases(100, texts=st.lists(text, min_size=1, max_size=4))
def test_texts_survive_the_tables(file, texts):
    rows = [{"prompt": t, "responses": [t, t + "!"], "rewards": [0.0, 1.0], "lengths": [1, 2]} for t in texts]
    if result(data.write_jsonl, file, rows) is not REFUSED:
        assert data.read_completions(file) == rows
    else:
        assert any("\ud800" <= c <= "\udfff" for t in texts for c in t)


@cases(
    150, row=st.fixed_dictionaries({
        "prompt": st.one_of(text, junk_json := st.sampled_from([None, 3, [], {}])),
        "responses": st.one_of(st.lists(st.one_of(text, junk_json), max_size=3), junk_json),
        "rewards": st.one_of(st.lists(st.one_of(st.sampled_from([0.1, 0.9, NAN]), junk_json), max_size=3), junk_json),
        "lengths": st.one_of(st.lists(st.sampled_from([0, 1, 5, -1, None, 2.5]), max_size=3), junk_json),
    }),
)  # fmt: skip
def test_completions(file, row):
    file.write_text(json.dumps(row))
    rows = result(data.read_completions, file)
    if rows is not REFUSED:
        made = result(data.all_pairs, rows)
        if made is not REFUSED:
            assert np.isfinite(made["chosen_reward"]).all() and np.isfinite(made["rejected_reward"]).all()
            assert min(made["chosen_reward"][i] - made["rejected_reward"][i] for i in range(len(made))) >= 0


PAIRS = [labelling.Pair("p", f"a{i}", f"b{i}") for i in range(3)]
GOOD = [
    json.dumps({"action": "label", "pair": p.id, "choice": "first", "left": "second"}).encode() for p in PAIRS
]
bad_lines = st.one_of(
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")),
    st.sampled_from([GOOD[0][:-5], b'{"action": "label", "pair": 3}', b"[]", b"null", b'{"pair": "x"}', b"\xef\xbb\xbf", b"[" * 3000,
                     json.dumps({"action": "label", "pair": "é", "choice": "both", "left": "first"}).encode()]),
)  # fmt: skip


@cases(200, lines=st.lists(bad_lines, max_size=4), place=st.integers(0, 4), windows=st.booleans())
def test_damaged_lines_lose_no_label(file, lines, place, windows):
    place = min(place, len(lines))
    content = [*lines[:place], *GOOD, *lines[place:]]
    file.write_bytes((b"\r\n" if windows else b"\n").join(content) + b"\n")
    labels = labelling.LabelFile(file, PAIRS)
    assert labels.labels() == ["first"] * 3 and labels.next() is None
    bad = [line for line in lines if line.strip() and line != b"\xef\xbb\xbf"]
    assert (
        len(labelling.read_labels(file).damaged)
        >= len([b for b in bad if b.strip(b"\xef\xbb\xbf \r\t\x0b\x0c\x1c")]) - 1
    )
    assert isinstance(labels.report(), str)


def test_lines_of_ten_megabytes(file, one_sentence):
    long = "é" * 5_000_000
    for line in (
        json.dumps({"a": long}, ensure_ascii=False).encode(),
        b"x" * 10_000_000,
        b"\xff" * 10_000_000,
    ):
        cases.run += 4
        file.write_bytes(GOOD[0] + b"\n" + line + b"\n" + GOOD[1] + b"\n")
        assert labelling.LabelFile(file, PAIRS).labels() == ["first", "first", None]
        assert len(labelling.read_labels(file).damaged) == 1
        with one_sentence("line"):
            data.read_jsonl(file, ["a"])
        result(tables.read_csv, file, ["a"])
        assert result(grading.scores_by_hand, file) in (REFUSED, {})
    file.write_text(json.dumps({"a": long}))
    assert data.read_jsonl(file, ["a"]) == [{"a": long}]


@cases(
    60,
    choice=st.one_of(text, junk),
    labels=st.lists(st.sampled_from(["first", "second", "tie", None, "x", 3]), max_size=4),
)
def test_choices(file, choice, labels):
    file.unlink(missing_ok=True)
    result(labelling.LabelFile(file, PAIRS).record, PAIRS[0], choice)
    assert labelling.read_labels(file).damaged == []
    rows = result(labelling.comparisons_of, PAIRS, labels)
    assert (rows is not REFUSED) == (len(labels) == len(PAIRS) and bool({"first", "second"} & set(labels)))


# --- data and training ------------------------------------------------------------------------------------------


@cases(
    100,
    rows=st.lists(st.tuples(text, text, text), max_size=3),
    lacks=st.sampled_from(["", "prompt", "rejected"]),
)
def test_comparisons(tokenizer, rows, lacks):
    import datasets

    names = [n for n in ("prompt", "chosen", "rejected") if n != lacks]
    columns = (
        dict(zip(("prompt", "chosen", "rejected"), zip(*rows, strict=True), strict=False)) if rows else {}
    )
    with contextlib.suppress(UnicodeEncodeError):  # the data set itself does not take half of a character
        table = datasets.Dataset.from_dict({n: list(columns.get(n, [])) for n in names})
        made = result(pairs.tokenize_pairs, table, tokenizer)
        assert (made is not REFUSED) == (not lacks and bool(rows))
        if made is not REFUSED:
            assert all(made.responses) and len(made) == len(rows)


@cases(80, size=st.integers(-1, 5), batch=st.integers(-1, 6), step=st.integers(0, 9), seed=st.integers(-1, 2))
def test_epoch_order(size, batch, step, seed):
    value = result(training.epoch_order, size, batch, step, seed)
    assert (value is not REFUSED) == (size >= 1 and batch >= 1 and seed >= 0)
    assert value is REFUSED or len(value) == min(size, batch) and set(value) <= set(range(size))


@cases(
    80,
    answer=st.one_of(junk, text, number, st.lists(number, max_size=3)),
    name=st.sampled_from(["00.1", "01.2", "04.1", "05.2"]),
)
def test_checks_never_raise(answer, name):
    for given_answer in (answer, lambda *a, **k: answer):
        found = checks.check(name, given_answer)
        assert found.passed in (True, False, None) and "\n" not in repr(found)


def test_there_were_enough_cases():
    cases.at_least(2000)
