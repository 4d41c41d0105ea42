"""Nonsense into judges, win rates, arena scores, people's data, the TL;DR world and the grader: as test_bad_input.py."""

import json
import math
import shutil

import datasets
import numpy as np
import pandas as pd
import pytest
from nonsense import INF, NAN, REFUSED, Cases, junk, number, result, st, text

from rlhf_edu import (
    arena,
    data,
    evaluate,
    grading,
    human,
    imdb,
    judge_endpoint,
    judges,
    labelling,
    lesson,
    models,
    preference,
    report,
    reward_model,
    rewards,
    sft,
    tldr,
    tokens,
    widgets,
    win_rates,
)
from rlhf_edu.training import TrainConfig

cases = Cases()
texts = st.lists(text, max_size=4)
preference_values = st.sampled_from([0.0, 0.5, 1.0, 1.0, 0.0, NAN, -1.0, 2.0, INF, None, "A"])
seeds = st.integers(0, 1000)


def known(values) -> bool:
    return all(isinstance(v, int | float) and 0 <= v <= 1 for v in values)


# --- judges -----------------------------------------------------------------------------------------------------


@cases(
    200,
    prompts=texts,
    first=texts,
    second=texts,
    same=st.booleans(),
    bad=number,
    temperature=number,
    margin=number,
)
def test_judges(prompts, first, second, same, bad, temperature, margin):
    if same:
        n = min(map(len, (prompts, first, second)))
        prompts, first, second = prompts[:n], first[:n], second[:n]

    def score(prompts, responses):  # the first score of a batch may be no number
        return np.array([bad if n == 0 else len(r) for n, r in enumerate(responses)], dtype=float)

    right = len(prompts) == len(first) == len(second)
    for kind in (judges.score_judge, judges.simulated_judge):
        made = result(
            kind,
            score,
            **({"margin": margin} if kind is judges.score_judge else {"temperature": temperature}),
        )
        if made is REFUSED:
            assert kind is judges.simulated_judge or not margin >= 0
            continue
        for judge in (made, judges.both_orders(made), judges.in_random_order(made)):
            value = result(judge, prompts, first, second)
            if not right or (prompts and not math.isfinite(bad)):
                assert value is REFUSED
            else:
                assert value is not REFUSED and value.shape == (len(prompts),) and known(value.tolist())
        found = result(judges.order_effect, made, prompts, first, second)
        assert (found is not REFUSED) == (right and bool(prompts) and math.isfinite(bad))
        assert found is REFUSED or known(found.values())


@cases(60, answers=st.one_of(st.lists(preference_values, max_size=3), junk), count=st.integers(0, 3))
def test_a_judge_of_ones_own_that_answers_nonsense(answers, count):
    asked = (["p"] * count, ["a"] * count, ["b"] * count)
    for judge in (judges.both_orders(lambda *_: answers), judges.in_random_order(lambda *_: answers)):
        value = result(judge, *asked)
        if value is not REFUSED:
            assert len(value) == count and known(value.tolist()), (answers, value)


@cases(20, prompts=texts, long=st.booleans())
def test_a_language_model_as_judge(policy, tokenizer, prompts, long):
    judge = result(judges.language_model_judge, policy, tokenizer, "{prompt} {first} {second}")
    if judge is not REFUSED:
        first = [p + " film" * (100 if long else 1) for p in prompts]
        value = result(judge, prompts, first, prompts)
        assert value is not REFUSED or prompts
        assert value is REFUSED or known(value.tolist())


@cases(60, answer=st.one_of(text, junk))
def test_answers_of_an_endpoint(answer):
    assert judge_endpoint.parse_answer(answer) in (None, 0.0, 1.0)


# --- win rates --------------------------------------------------------------------------------------------------


@st.composite
def comparisons_with_lengths(draw):
    count = draw(st.integers(0, 5))
    seed = np.random.default_rng(draw(seeds))
    columns = [list(seed.integers(0, 3, count) / 2), list(seed.integers(1, 90, count).astype(float))]
    columns += [list(seed.integers(1, 90, count).astype(float)), list(seed.normal(size=count))]
    kind = draw(st.sampled_from(["right", "equal", "nan", "shape", "junk", "ties", "preference"]))
    at = draw(st.integers(0, 3))
    if kind == "equal":
        columns[1] = columns[2]
    elif kind == "nan" and count:
        columns[at][draw(st.integers(0, count - 1))] = draw(st.sampled_from([NAN, INF, -INF]))
    elif kind == "shape":
        columns[at] = draw(st.sampled_from([[1.0], [[1.0] * count], []]))
    elif kind == "junk":
        columns[at] = draw(junk)
    elif kind == "ties":
        columns[0] = [0.5] * count
    elif kind == "preference" and count:
        columns[0][0] = draw(preference_values)
    return kind, count, columns


@cases(250, drawn=comparisons_with_lengths(), difficulty=st.booleans())
def test_length_controlled_win_rates(drawn, difficulty):
    kind, count, columns = drawn
    value = result(win_rates.length_controlled_win_rate, *columns[: 4 if difficulty else 3])
    assert value is REFUSED or 0 <= value <= 100, (columns, value)
    assert value is not REFUSED or kind not in ("equal", "ties") or count < 3
    if count and kind in ("nan",) and any(not np.isfinite(c).all() for c in columns[:3]):
        assert value is REFUSED
    value = result(win_rates.bootstrap, lambda p, *_: float(np.mean(p)), *columns[:2], resamples=5)
    if kind in ("right", "equal", "ties"):
        assert (value is not REFUSED) == (count >= 2)


@cases(
    80,
    table=st.one_of(st.lists(st.lists(preference_values, min_size=2, max_size=2), max_size=3), junk),
    ridge=number,
)
def test_difficulty_of_prompts(table, ridge):
    value = result(win_rates.prompt_difficulty, table, ridge=ridge)
    assert value is REFUSED or np.isfinite(value).all(), (table, ridge, value)
    rows = table if isinstance(table, list) else [table]
    value = result(
        win_rates.fit_logistic, [r[0] if isinstance(r, list) and r else r for r in rows], table, ridge=ridge
    )
    assert value is REFUSED or np.isfinite(value).all(), (table, ridge, value)


# --- arena ------------------------------------------------------------------------------------------------------


@cases(
    150, names=st.lists(st.sampled_from(["a", "b", "base"]), max_size=3), rows=st.lists(st.lists(preference_values, min_size=2, max_size=2), max_size=3),
    weight=st.sampled_from([None, None, 1, 3, 0, -1, NAN, 1.5]), style=st.booleans(), resamples=st.sampled_from([5, 5, 1, 0, -1]),
    length=st.sampled_from([10.0, 0.0, -1.0, NAN]), ridge=st.sampled_from([1e-2, 1.0, 0.0, -1.0, NAN]),
)  # fmt: skip
def test_arena(names, rows, weight, style, resamples, length, ridge):
    lengths = np.full((len(rows) + 1, 2), length) if style else None
    weights = None if weight is None else np.full((len(rows), 2), weight)
    table = result(arena.battles, names, rows, "base", lengths, weights=weights)
    if table is REFUSED:
        return
    scores = result(arena.arena_scores, table, "base", style=style, resamples=resamples, ridge=ridge)
    strengths = result(arena.bradley_terry, table, "base", style=style, ridge=ridge)
    if scores is not REFUSED:
        assert np.isfinite(scores.to_numpy(dtype=float)).all(), (scores, rows, names, weight)
    assert strengths is REFUSED or np.isfinite(strengths.to_numpy(dtype=float)).all()
    if all(known(r) for r in rows) and rows and "base" not in names and weight in (None, 1, 3) and ridge > 0:
        assert strengths is not REFUSED or not length >= 0


@cases(80, prompts=st.sampled_from([-1, 0, 1, 2, 20, NAN, None]), rate=st.one_of(st.sampled_from([50.0, 60.0, 99.0]), number, junk),
       spread=st.one_of(st.sampled_from([1.5, 0.0]), number), runs=st.sampled_from([0, 1, 20]))  # fmt: skip
def test_power(prompts, rate, spread, runs):
    for other in (None, 50.0, rate):
        value = result(arena.power, prompts, rate, other, spread=spread, runs=runs)
        assert value is REFUSED or 0 <= value <= 1, (prompts, rate, spread, runs)


@cases(
    80,
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN, 2.0]), max_size=4),
    judgments=st.integers(-1, 3),
    noise=number,
)
def test_grades(scores, judgments, noise):
    grades = result(arena.simulated_grades, scores, judgments=judgments, noise=noise)
    if grades is not REFUSED:
        assert ((grades >= 1) & (grades <= 10)).all(), (scores, judgments, noise, grades)
        found = result(arena.grade_variance, grades)
        assert (found is not REFUSED) == (min(grades.shape) >= 2)
    found = result(arena.grade_variance, [[s, 1.0] for s in scores])
    assert found is REFUSED or all(map(math.isfinite, found.values())), (scores, found)


# --- evaluate ---------------------------------------------------------------------------------------------------


@cases(120, shape=st.tuples(st.integers(0, 3), st.integers(0, 3)), betas=st.lists(st.one_of(st.just(0.1), number), max_size=3), bad=number,
       logps=st.sampled_from([None, None, "shape", NAN]))  # fmt: skip
def test_tilted_frontier_and_best_of_n(shape, betas, bad, logps):
    values = np.zeros(shape)
    values[:1, :1] = bad
    given = (
        None
        if logps is None
        else np.zeros((shape[0], shape[1] + 1))
        if logps == "shape"
        else np.full(shape, NAN)
    )
    value = result(evaluate.tilted_frontier, values, betas, logps=given)
    if value is not REFUSED:
        assert (
            len(value) == len(betas)
            and np.isfinite(value.drop(columns="reward_se", errors="ignore").to_numpy(float)).all()
        )
    assert value is REFUSED or (all(shape) and logps is None and math.isfinite(bad))
    chosen = result(evaluate.best_of_n, np.zeros(shape), [1], choose_by=values)
    assert (chosen is not REFUSED) == (all(shape) and math.isfinite(bad))
    spread = np.full(shape[1], 1 / max(1, shape[1]))
    n = betas[0] if betas else 2
    value = result(evaluate.best_of_n_distribution, spread, values[0] if shape[0] else [], n)
    if value is not REFUSED:
        assert np.isfinite(value).all() and abs(value.sum() - 1) < 1e-6, (shape, bad, n, value)


@cases(80, xs=st.lists(number, max_size=4), ys=st.lists(number, max_size=4), x=number)
def test_curves_and_correlations(xs, ys, x):
    value = result(evaluate.reward_on_curve, xs, ys, x)
    inside = xs and all(map(math.isfinite, [*xs, *ys, x])) and min(xs) <= x <= max(xs)
    assert value is REFUSED or math.isfinite(value) == bool(inside), (xs, ys, x, value)
    n = min(len(xs), len(ys))
    table = pd.DataFrame({"length": xs[:n], "logp_per_token": ys[:n]})
    value = result(evaluate.spearman, table)
    assert value is REFUSED or -1 <= value <= 1 or len(set(xs[:n])) < 2 or len(set(ys[:n])) < 2


ids = st.lists(st.lists(st.sampled_from([3, 5, 319, 320, -1]), max_size=3), max_size=3)


@cases(60, prompts=ids, responses=ids)
def test_sequences_of_ids(policy, tokenizer, prompts, responses):
    fine = len(prompts) == len(responses) and all(prompts)
    inside = all(0 <= i < policy.config.vocab_size for row in [*prompts, *responses] for i in row)
    value = result(evaluate.sequence_kl, policy, policy, prompts, responses, 0)
    assert (value is not REFUSED) == (fine and inside)
    assert value is REFUSED or (np.abs(np.concatenate(value)) < 1e-5).all()
    classifier = models.classifier_from(policy, labels=2, seed=0)
    for score in (
        rewards.oracle_score(classifier, tokenizer),
        rewards.reward_model_score(classifier, tokenizer),
    ):
        value = result(score, prompts, responses)
        assert (value is not REFUSED) == (fine and inside), (prompts, responses)
        assert value is REFUSED or np.isfinite(value).all()


@cases(30, prompts=ids, responses=ids)
def test_training_on_sequences_of_ids(policy, tokenizer, prompts, responses):
    config = TrainConfig(steps=1, learning_rate=1e-3)
    value = result(
        sft.train_sft, policy, prompts, responses, tokenizer=tokenizer, config=config, batch_size=4
    )
    if value is not REFUSED:
        assert np.isfinite(value["loss"]).all()
    inside = all(0 <= i < policy.config.vocab_size for row in [*prompts, *responses] for i in row)
    fine = len(prompts) == len(responses) > 0 and all(prompts) and inside and any(responses)
    assert (value is not REFUSED) == fine, (prompts, responses)


@cases(30, rows=st.lists(st.tuples(text, text, text), max_size=2))
def test_training_with_the_tokenizer_of_another_model(policy, sentences, rows):
    large = tokens.train_tokenizer(sentences, 400)
    rows = [{"prompt": "The film", "chosen": " was great and a lot of other words", "rejected": " bad"}, *(
        dict(zip(("prompt", "chosen", "rejected"), r, strict=True)) for r in rows)]  # fmt: skip
    try:
        table = datasets.Dataset.from_list(rows)
    except UnicodeEncodeError:
        return  # the data set itself does not take half of a character
    config = TrainConfig(steps=1, learning_rate=1e-3)
    used = tokens.encode(large, [r[k] for r in rows for k in r])
    inside = all(i < policy.config.vocab_size for row in used for i in row)
    model = models.classifier_from(policy, labels=1, seed=0).requires_grad_(True)
    for train, net in ((preference.train_preference, policy), (reward_model.train_reward_model, model)):
        value = result(train, net, table, tokenizer=large, config=config, batch_size=9)
        assert (value is not REFUSED) == inside
        assert value is REFUSED or np.isfinite(value["loss"]).all()


# --- people's data, IMDb, judges' caches ------------------------------------------------------------------------

noise = st.one_of(
    st.binary(max_size=50),
    st.sampled_from([b"", b"\n", b"{", b"[]", b"{}", b"null", b"3\n", b'"x"', b"[1, 2]", b'[{"a": 1}]', b"\xff\xfe\x00", b"a,b\n1,2", b"a,b\n",
                     b"[" * 3000, b"\x1f\x8b\x08\x00broken", b"PAR1broken"]),
)  # fmt: skip
FILES = (
    "helpful-base.test.jsonl",
    "x_tldr_test.jsonl",
    "summarize_comparisons_test.jsonl",
    "tldr_samples.csv",
    "testset-v1.json",
)
READERS = (
    human.load_hh,
    human.load_tldr,
    human.load_summary_comparisons,
    human.load_summary_samples,
    human.load_pandalm,
)
fields = st.fixed_dictionaries(
    {
        name: st.one_of(text, st.sampled_from([None, 3, [], {}, "\n\nHuman: a\n\nAssistant: b", "0", "1", NAN]))
        for name in ("chosen", "rejected", "prompt", "label", "model_type", "context", "ref_text", "sample", "instruction", "input",
                     "response1", "response2", "annotator1", "annotator2", "annotator3", "text", "film")
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("folder")


@pytest.mark.parametrize("which", range(5), ids=FILES)
@cases(50, content=noise, row=fields, kind=st.sampled_from(["noise", "row", "gz", "parquet"]))
def test_files_of_people(folder, which, content, row, kind):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    name = FILES[which] + (".gz" if kind == "gz" else "")
    path = folder / (FILES[which].split(".")[0] + ".test.parquet" if kind == "parquet" else name)
    if kind == "row" and path.suffix == ".csv":
        pd.DataFrame([row]).to_csv(path, index=False, errors="replace")
    elif kind == "row":
        path.write_text(json.dumps([row] if path.suffix == ".json" else row))
    else:
        path.write_bytes(content)
    value = result(READERS[which], folder)
    if value is not REFUSED and which < 3:
        assert all(isinstance(v, str) for r in value for v in r.values())
    assert value is not REFUSED or result(READERS[which], folder / "missing") is REFUSED


@cases(60, content=noise, row=fields, good=st.booleans())
def test_imdb_files_and_kept_answers(folder, content, row, good):
    folder.mkdir(exist_ok=True)
    path = folder / "train.jsonl"
    path.write_bytes(json.dumps(row).encode() + b"\n" if good else content)
    value = result(imdb._read_jsonl, path)
    assert value is REFUSED or all(isinstance(r["text"], str) for r in value)
    kept = result(judge_endpoint.read_cache, path)
    assert kept is REFUSED or isinstance(kept, dict)


@cases(60, rows=st.lists(st.tuples(text, text), max_size=4))
def test_the_length_of_chosen_answers(rows):
    table = {"chosen": [a for a, _ in rows], "rejected": [b for _, b in rows]}
    value = result(human.longer_is_chosen, table)
    assert (value is not REFUSED) == any(len(a) != len(b) for a, b in rows)
    assert value is REFUSED or 0 <= value["low"] <= value["share"] <= value["high"] <= 1


@cases(80, rows=st.lists(st.lists(text, max_size=3), max_size=3), count=st.integers(-1, 3), bad=number)
def test_drawn_pairs_and_simulated_labels(rows, count, bad):
    completions = [
        {"prompt": "p", "responses": r, "rewards": [bad] * len(r), "lengths": [1] * len(r)} for r in rows
    ]
    different = sum(len(set(r)) > 1 for r in rows)
    drawn = result(labelling.draw_pairs, completions, count)
    assert (drawn is not REFUSED) == (1 <= count <= different)
    if drawn is not REFUSED and drawn:
        said = result(labelling.simulated_labels, drawn, rewards.Labeler())
        assert (said is not REFUSED) == math.isfinite(bad)
    n = len(rows[0]) if rows else 0
    made = result(data.completion_rows, ["p"] * count, [""] * n, [bad] * n, [1] * n)
    assert (made is not REFUSED) == (count > 0 and n > 0 and n % count == 0)
    split = result(data.split_prompts, [str(r) for r in rows], count)
    assert split is REFUSED or not set(split[0]) & set(split[1])


# --- the TL;DR world --------------------------------------------------------------------------------------------

POSTS = tldr.posts(3, seed=1)


@cases(
    120,
    summary=st.one_of(
        text, st.sampled_from(["", " ", "Tom broke my lamp.", "é" * 1000, "\x00", POSTS[0].prompt])
    ),
    wrong=junk,
)
def test_summaries(summary, wrong):
    for post in POSTS:
        found = tldr.judge_summary(post, summary)
        assert all(math.isfinite(v) for v in found.values()) and 0 <= found["covered"] <= 1
    assert len(tldr.scores(POSTS, [summary] * 3)) == 3
    assert result(tldr.scores, POSTS, [summary]) is REFUSED
    if not isinstance(wrong, str):
        assert result(tldr.judge_summary, POSTS[0], wrong) is REFUSED


@cases(
    60,
    count=st.integers(-2, 3),
    style=st.one_of(text, st.sampled_from(["forum", "news"])),
    seed=st.integers(-1, 3),
)
def test_posts(count, style, seed):
    made = result(tldr.posts, count, seed, style)
    assert (made is not REFUSED) == (count >= 0 and style in tldr.STYLES and seed >= 0)
    assert made is REFUSED or len(made) == count


@cases(30, name=st.one_of(text, st.sampled_from(["sftt", "../sft", "", "reward/"])))
def test_checkpoints_that_are_not_there(name):
    if name not in ("sft", "dpo", "ppo", "preferred_ft", "reward"):
        assert result(tldr.load, name) is REFUSED


# --- checkpoints, notebooks, the grader's folders ---------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "model"
    models.save_model(models.new_policy(tokenizer, 0, layers=1, width=32, heads=2), tokenizer, folder)
    return folder


@cases(80, content=noise, name=st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]),
       keep=st.integers(0, 200), whole=st.booleans())  # fmt: skip
def test_damaged_checkpoints(saved, content, name, keep, whole):
    path = saved / name
    right = path.read_bytes()
    try:
        path.write_bytes(content if whole else right[:keep] + content)
        tokenizer = result(tokens.load_tokenizer, saved)
        policy = result(models.load_policy, saved)
        assert tokenizer is not REFUSED or name.startswith("tokenizer") or name == "config.json"
        assert policy is not REFUSED or not name.startswith("tokenizer")
        if name == "model.safetensors":
            assert policy is REFUSED
    finally:
        path.write_bytes(right)


@cases(60, content=noise)
def test_settings_of_the_grader_that_are_damaged(folder, content):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "settings.json").write_bytes(content)
    assert result(grading.load, folder) is REFUSED


# --- what is shown ----------------------------------------------------------------------------------------------

EVIL = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "]]></script><b>",
    "</td></table><h1>",
    "&lt;b&gt;",
)


@cases(80, texts=st.lists(st.one_of(text, st.sampled_from(EVIL)), max_size=3), ratio=number)
def test_html_of_texts_holds_no_markup_of_theirs(texts, ratio):
    bare = ("<script", "<img", "<h1")
    shown = [report.table([*texts, "x"], [texts], "samples")]
    table = lesson.Table([{t or "empty": t for t in texts}] if texts else [])
    shown += [table._repr_html_(), repr(table)[:0]]
    coloured = result(widgets.ColouredTokens, texts, [ratio] * len(texts), labels=(EVIL[0], EVIL[1]))
    assert (coloured is not REFUSED) == bool(texts)
    if coloured is not REFUSED:
        shown.append(coloured._repr_html_())
        assert repr(coloured)
    if texts:
        pair = labelling.Pair(texts[0], texts[-1], texts[-1] + EVIL[2])
        file = labelling.LabelFile("nowhere.jsonl", [pair])
        panel = labelling.LabelPanel(file, EVIL[1])
        panel.show(EVIL[0])
        shown += [
            panel.question.value,
            panel.prompt.value,
            panel.message.value,
            *(s.value for s in panel.sides.values()),
        ]
    assert not any(mark in page for page in shown for mark in bare), shown


def test_there_were_enough_cases():
    cases.at_least(2000)
