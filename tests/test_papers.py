"""The papers' tables in data/papers: complete, in range, and what the course says about them holds."""

import itertools
import shutil

import numpy as np
import pandas as pd
import pytest

from rlhf_edu import papers

SETTINGS = ["Mistral-Base", "Mistral-Instruct", "Llama-3-Base", "Llama-3-Instruct"]
METHODS = ["SFT", "RRHF", "SLiC-HF", "DPO", "IPO", "CPO", "KTO", "ORPO", "R-DPO", "SimPO"]
LC, WR, HARD = "AlpacaEval 2 LC", "AlpacaEval 2 WR", "Arena-Hard WR"
TURBO, GPT4 = "MT-Bench GPT-4 Turbo", "MT-Bench GPT-4"
MEASURES = [LC, WR, HARD, TURBO, GPT4]
RHO = "Spearman, mean log-prob and length"


def values(name, keys):
    """{keys of a row: value}."""
    return papers.table(name).set_index(list(keys))["value"].to_dict()


@pytest.fixture(scope="module")
def main():
    return values("simpo_main", ("setting", "method", "measure"))


@pytest.fixture(scope="module")
def ablation():
    return values("simpo_ablation", ("setting", "method", "measure"))


@pytest.fixture(scope="module")
def v02():
    return values("simpo_v02", ("setting", "method", "measure"))


@pytest.fixture(scope="module")
def statistics():
    return values("simpo_statistics", ("setting", "method", "measure"))


@pytest.fixture(scope="module")
def study():
    return values("dpo_human_study", ("method", "measure"))


@pytest.fixture(scope="module")
def instructgpt():
    return papers.table("instructgpt").set_index("quantity")


# --- every table ---


@pytest.mark.parametrize("name", papers.TABLES)
def test_every_row_has_its_source_and_a_value_in_range(name):
    table = papers.table(name)
    assert table["value"].notna().all() and (table["value"] >= 0).all()
    assert (table["unit"] != "").all() and (table["source"] != "").all()
    arxiv = {"simpo": "arXiv:2405.14734", "dpo": "arXiv:2305.18290", "instructgpt": "arXiv:2203.02155"}
    assert set(table["paper"]) == {arxiv[name.split("_")[0]]}
    assert table.loc[table["unit"] == "%", "value"].between(0, 100).all()
    assert table.loc[table["unit"] == "score 1-10", "value"].between(1, 10).all()
    assert table.loc[table["unit"] == "rho", "value"].between(-1, 1).all()
    assert table["page"].dropna().between(1, 68).all()
    assert not any(c.isspace() and c != " " for c in "".join(table.select_dtypes(exclude="number").sum()))


def test_every_file_is_a_table_and_plain_pandas_reads_the_same():
    assert {p.stem for p in papers.FOLDER.glob("*")} == set(papers.TABLES)
    for name in papers.TABLES:
        plain = pd.read_csv(papers.FOLDER / f"{name}.csv")
        ours = papers.table(name)
        assert list(plain) == list(ours)
        assert np.array_equal(plain["value"], ours["value"])
        assert list(plain["paper"]) == list(ours["paper"])  # "2305.18290" alone would become a number


def test_what_is_unverified_says_so():
    rates = papers.table("dpo_win_rates")
    drawn = rates["read_from"] == "figure"
    assert rates.loc[drawn, "note"].str.startswith("unverified").all() and drawn.sum() == 5
    for name in papers.TABLES:
        table = papers.table(name)
        if "temperature" in table:
            assert table["temperature"].between(0, 1).all()


# --- SimPO's main table ---


def test_main_table_is_complete(main):
    assert set(main) == set(itertools.product(SETTINGS, METHODS, MEASURES)) and len(main) == 4 * 10 * 5
    table = papers.table("simpo_main")
    assert list(table["setting"].unique()) == SETTINGS and list(table["method"].unique()) == METHODS
    wide = table.pivot(index="method", columns=["setting", "measure"], values="value")
    assert wide.shape == (10, 20) and wide.notna().all(axis=None)


def test_some_cells_of_the_main_table(main):
    assert [main["Mistral-Base", "SFT", m] for m in MEASURES] == [8.4, 6.2, 1.3, 4.8, 6.3]
    assert [main["Mistral-Instruct", "CPO", m] for m in MEASURES] == [23.8, 28.8, 22.6, 6.3, 7.5]
    assert [main["Llama-3-Base", "R-DPO", m] for m in MEASURES] == [17.6, 14.4, 17.2, 6.6, 7.5]
    assert [main["Llama-3-Instruct", "SimPO", m] for m in MEASURES] == [44.7, 40.5, 33.8, 7.0, 8.0]


def test_no_cell_of_the_main_table_was_changed(main):
    sums = {s: [round(sum(main[s, m, k] for m in METHODS), 1) for k in MEASURES] for s in SETTINGS}
    assert sums == {  # added up from the printed table
        "Mistral-Base": [134.3, 111.0, 76.4, 55.9, 70.7],
        "Mistral-Instruct": [245.8, 245.9, 180.5, 63.8, 76.3],
        "Llama-3-Base": [140.0, 123.9, 119.0, 61.9, 74.3],
        "Llama-3-Instruct": [336.4, 324.4, 286.0, 69.1, 80.6],
    }


def test_simpo_wins_both_alpacaeval_columns_in_all_four_settings(main):
    for setting, measure in itertools.product(SETTINGS, (LC, WR)):
        others = [main[setting, m, measure] for m in METHODS if m != "SimPO"]
        assert main[setting, "SimPO", measure] > max(others)
    for setting in SETTINGS:
        assert main[setting, "SimPO", HARD] > main[setting, "DPO", HARD]


def test_gains_named_in_simpos_abstract(main):
    def gains(measure, over):
        return [round(main[s, "SimPO", measure] - over(s, measure), 1) for s in SETTINGS]

    assert max(gains(LC, lambda s, m: main[s, "DPO", m])) == 6.4
    assert max(gains(HARD, lambda s, m: main[s, "DPO", m])) == 7.5
    best = gains(LC, lambda s, k: max(main[s, m, k] for m in METHODS if m != "SimPO"))
    assert (min(best), max(best)) == (3.6, 4.8)


def test_where_simpo_is_not_best(main):
    beaten, tied = {}, {}
    for setting, measure in itertools.product(SETTINGS, MEASURES):
        simpo = main[setting, "SimPO", measure]
        others = {m: main[setting, m, measure] for m in METHODS if m != "SimPO"}
        if above := {m for m, v in others.items() if v > simpo}:
            beaten[setting, measure] = above
        elif equal := {m for m, v in others.items() if v == simpo}:
            tied[setting, measure] = equal
    assert beaten == {
        ("Mistral-Instruct", HARD): {"CPO"},
        ("Mistral-Base", GPT4): {"SLiC-HF", "R-DPO"},
        ("Mistral-Instruct", GPT4): {"SLiC-HF", "IPO", "KTO", "ORPO"},
        ("Llama-3-Base", GPT4): {"KTO"},
        ("Llama-3-Instruct", GPT4): {"SFT", "SLiC-HF", "IPO", "KTO"},
    }
    assert tied == {
        ("Llama-3-Base", TURBO): {"R-DPO"},
        ("Llama-3-Instruct", TURBO): {"DPO", "IPO", "CPO", "R-DPO"},
    }
    assert main["Mistral-Instruct", "CPO", HARD] == 22.6 and main["Mistral-Instruct", "SimPO", HARD] == 21.0


def test_mt_bench_separates_the_methods_least(main):
    def spread(setting, measure):  # of the trained methods, over the best of them
        scores = [main[setting, m, measure] for m in METHODS[1:]]
        return (max(scores) - min(scores)) / max(scores)

    for setting in SETTINGS:
        assert max(spread(setting, m) for m in (TURBO, GPT4)) < min(
            spread(setting, m) for m in (LC, WR, HARD)
        )


# --- ablation, newer settings, hyper-parameters, statistics ---


def test_ablation_is_complete_but_for_one_cell(ablation):
    variants = ["DPO", "SimPO", "SimPO w/o LN", "SimPO gamma=0"]
    every = set(itertools.product(SETTINGS[:2], variants, MEASURES))
    assert every - set(ablation) == {("Mistral-Instruct", "SimPO gamma=0", GPT4)} and set(ablation) < every


def test_ablation_repeats_the_main_table_and_has_the_lost_cell(main, ablation):
    for setting, method, measure in itertools.product(SETTINGS[:2], ("DPO", "SimPO"), MEASURES):
        assert ablation[setting, method, measure] == main[setting, method, measure]
    assert ablation["Mistral-Base", "SimPO w/o LN", LC] == 11.9


def test_both_parts_of_simpo_matter_and_the_length_norm_more(ablation):
    for setting in SETTINGS[:2]:
        lc = {m: ablation[setting, m, LC] for _, m, _ in ablation}
        assert lc["SimPO"] > lc["SimPO gamma=0"] > lc["DPO"] > lc["SimPO w/o LN"]
        # without the norm the raw win rate is above the length-controlled one: its outputs are long
        assert ablation[setting, "SimPO w/o LN", WR] > lc["SimPO w/o LN"]
    assert ablation["Mistral-Base", "SimPO", WR] < ablation["Mistral-Base", "SimPO", LC]


def test_v02(v02, main, statistics):
    new, gemma = "Llama-3-Instruct v0.2", "Gemma-2-9b-it"
    expected = set(itertools.product([new], METHODS[1:], [LC, WR, HARD]))
    assert set(v02) == expected | set(itertools.product([gemma], ["SFT", "DPO", "SimPO"], [LC, WR, HARD]))
    assert v02[new, "SimPO", LC] == max(v02[new, m, LC] for m in METHODS[1:]) == 53.7
    assert v02[new, "SimPO", WR] == v02[new, "DPO", WR] == 47.5  # level with DPO in raw win rate
    assert v02[new, "IPO", HARD] == 36.6 > v02[new, "SimPO", HARD] == 36.5  # and below IPO on Arena-Hard
    assert all(v02[gemma, "SimPO", m] > v02[gemma, "DPO", m] for m in (LC, WR, HARD))
    # better labels move DPO by more than SimPO leads it by
    gain = v02[new, "DPO", LC] - main["Llama-3-Instruct", "DPO", LC]
    assert gain > main["Llama-3-Instruct", "SimPO", LC] - main["Llama-3-Instruct", "DPO", LC]
    assert statistics[new, "SimPO lr=1e-6", LC] == v02[new, "SimPO", LC]
    assert statistics[new, "SFT", LC] == main["Llama-3-Instruct", "SFT", LC]


def test_search_ranges():
    table = papers.table("simpo_search")
    grid = {k: list(g["value"]) for k, g in table.groupby(["method", "parameter"])}
    assert set(table["method"]) == set(METHODS) - {"SFT", "RRHF"} | {
        "every method"
    }  # RRHF's range is not known
    assert grid["SimPO", "beta"] == [2.0, 2.5] and grid["SimPO", "gamma"] == [0.3, 0.5, 1.0, 1.2, 1.4, 1.6]
    assert grid["DPO", "beta"] == grid["CPO", "beta"] == grid["KTO", "beta"] == grid["R-DPO", "beta"]
    assert min(grid["SimPO", "beta"]) / max(grid["DPO", "beta"]) == pytest.approx(20)
    assert all(v == sorted(set(v)) for v in grid.values())
    assert table.loc[table["note"] == "fixed", "value"].eq(1).all()


def test_chosen_values_lie_in_their_ranges_and_the_two_ways_to_write_gamma_agree():
    chosen = values("simpo_chosen", ("method", "setting", "parameter"))
    table = papers.table("simpo_search")
    grid = {k: set(g["value"]) for k, g in table.groupby(["method", "parameter"])}
    for setting in SETTINGS:
        beta, gamma = (chosen["SimPO", setting, p] for p in ("beta", "gamma"))
        assert beta in grid["SimPO", "beta"] and gamma in grid["SimPO", "gamma"]
        assert chosen["SimPO", setting, "learning_rate"] in grid["every method", "learning_rate"]
        ratio = chosen["SimPO", setting, "gamma_beta_ratio"]
        assert beta * ratio == pytest.approx(gamma, abs=0.0501)  # the paper prints one decimal
        assert chosen["DPO", setting, "beta"] == min(grid["DPO", "beta"]) == 0.01  # the edge of its range
    # published after the paper's search: outside it
    assert chosen["SimPO", "Llama-3-Instruct v0.2", "beta"] == 10 > max(grid["SimPO", "beta"])
    assert chosen["DPO", "Llama-3-Instruct", "learning_rate"] not in grid["every method", "learning_rate"]


def test_length_statistics(statistics):
    assert [statistics["", m, RHO] for m in ("SimPO", "DPO", "SimPO w/o LN")] == [0.34, 0.59, 0.82]
    length = {
        m: statistics["Mistral-Base", m, "AlpacaEval 2 length"] for m in ("DPO", "SimPO", "SimPO w/o LN")
    }
    assert round(100 * (length["SimPO"] / length["DPO"] - 1)) == 26  # "without exploiting length" has limits
    assert round(100 * (length["SimPO w/o LN"] / length["SimPO"] - 1)) == 26
    for setting in ("Llama-3-Instruct", "Gemma-2-9b-it"):
        assert (
            statistics[setting, "SimPO", "AlpacaEval 2 length"]
            < statistics[setting, "DPO", "AlpacaEval 2 length"]
        )


def test_half_of_dpos_rankings_disagree_with_the_likelihood(statistics):
    agree, against = (
        statistics["", "DPO", f"mean log-prob ranks {how} the reward{does}"]
        for how, does in (("as", " does"), ("against", ""))
    )
    assert against / (agree + against) == pytest.approx(0.48, abs=0.005)


def test_cost_is_lower_by_18_and_10_percent(statistics):
    for measure, percent in (("training time", 18), ("peak memory of a GPU", 10)):
        simpo, dpo = (statistics["Llama-3-Base", m, measure] for m in ("SimPO", "DPO"))
        assert round(100 * (1 - simpo / dpo)) == percent


def test_what_preference_training_costs_in_mathematics(statistics):
    for setting in ("Mistral-Base", "Llama-3-Base", "Llama-3-Instruct"):
        sft, dpo, simpo = (statistics[setting, m, "GSM8K"] for m in ("SFT", "DPO", "SimPO"))
        assert max(dpo, simpo) < sft
    runs = [f"SimPO lr={lr}" for lr in ("4e-7", "5e-7", "1e-6")]
    chat, maths = ([statistics["Llama-3-Instruct v0.2", r, m] for r in runs] for m in (LC, "ZeroEval GSM"))
    assert chat == sorted(chat) and maths == sorted(maths, reverse=True)
    assert maths[0] - maths[1] < 1 and maths[1] - maths[2] > 19  # it breaks at the last step
    with_sft = statistics["Llama-3-Instruct v0.2", "SimPO + SFT loss", LC]
    assert with_sft == 41.4 < chat[-1]


# --- DPO ---


def test_human_study_is_complete(study):
    agreement = [f"{a}-human agreement" for a in ("GPT-4 (S)", "GPT-4 (C)", "human")]
    wins = ["GPT-4 (S) win", "GPT-4 (C) win", "human win"]
    every = set(itertools.product(["DPO", "SFT", "PPO-1"], ["respondents", *wins, *agreement]))
    assert every - set(study) == {("SFT", "human-human agreement")}  # one person a pair: nobody to agree with
    assert [study[m, "respondents"] for m in ("DPO", "SFT", "PPO-1")] == [272, 122, 199]
    assert set(papers.table("dpo_human_study")["against"]) == {"PPO at temperature 0"}


def test_human_study_agreement_rows(study):
    rows = {
        judge: [study[m, f"{judge}-human agreement"] for m in ("DPO", "SFT", "PPO-1")]
        for judge in ("GPT-4 (S)", "GPT-4 (C)")
    }
    assert rows == {"GPT-4 (S)": [70, 77, 86], "GPT-4 (C)": [67, 79, 85]}
    people = {m: study[m, "human-human agreement"] for m in ("DPO", "PPO-1")}
    assert people == {"DPO": 65, "PPO-1": 87}
    # GPT-4 agrees with people about as often as people do with each other: within 5 points, both ways
    for judge, method in itertools.product(rows, people):
        assert abs(study[method, f"{judge}-human agreement"] - people[method]) <= 5


def test_prompt_c_is_nearer_to_people_and_judges_keep_the_order(study):
    for method in ("DPO", "SFT"):
        far, near = (
            abs(study[method, f"{j} win"] - study[method, "human win"]) for j in ("GPT-4 (S)", "GPT-4 (C)")
        )
        assert near < far
    for judge in ("GPT-4 (S)", "GPT-4 (C)", "human"):
        assert study["DPO", f"{judge} win"] > study["SFT", f"{judge} win"] > study["PPO-1", f"{judge} win"]
        assert study["SFT", f"{judge} win"] < study["DPO", f"{judge} win"] <= 58
    # with 272 judgments, 58 % is more than two standard errors above one half
    assert (0.58 - 0.5) / np.sqrt(0.58 * 0.42 / study["DPO", "respondents"]) > 2


def test_win_rates():
    rate = values("dpo_win_rates", ("task", "method", "temperature", "read_from"))
    assert rate["TL;DR", "DPO", 0, "text"] == 61 and rate["TL;DR", "PPO", 0, "text"] == 57
    drawn = {m: rate["TL;DR", m, t, "figure"] for m, t in (("DPO", 0), ("PPO", 0), ("Best of 128", 0.5))}
    assert all(abs(drawn[m] - rate["TL;DR", m, 0, "text"]) < 1 for m in ("DPO", "PPO"))
    # DPO's best is above Best of 128's, by less than two standard errors of 256 comparisons each
    p, q = drawn["DPO"] / 100, drawn["Best of 128"] / 100
    assert 0 < p - q < 2 * np.sqrt(p * (1 - p) / 256 + q * (1 - q) / 256)
    assert all(abs(v * 2.56 - round(v * 2.56)) < 0.15 for v in drawn.values())  # whole numbers out of 256
    for t in (0, 0.25):
        assert 50 > rate["CNN/DailyMail", "DPO", t, "table"] > rate["CNN/DailyMail", "PPO", t, "table"]
    assert rate["HH dialogue", "DPO", 1, "figure"] > rate["HH dialogue", "Best of 128", 1, "figure"] > 50


# --- InstructGPT ---


def test_instructgpt_headlines(instructgpt):
    value, spread = instructgpt["value"], instructgpt["plus_minus"]
    for rival, percent, plus_minus in (("", 85, 3), ("few-shot ", 71, 4)):
        row = f"175B InstructGPT over {rival}175B GPT-3"
        assert (value[row], spread[row], instructgpt["page"][row]) == (percent, plus_minus, 3)
    assert "1.3B" in instructgpt["note"]["175B InstructGPT over 175B GPT-3"]
    assert [value[f"training prompts {s}"] for s in ("SFT", "RM", "PPO")] == [12725, 33207, 31144]
    gpt3, ours = (value[f"closed-domain hallucination of {m}"] for m in ("GPT-3", "InstructGPT"))
    assert (gpt3, ours) == (41, 21) and round(gpt3 / ours) == 2
    # a win rate against itself would be 50 %: FLAN and T0 lose to the SFT baseline
    assert max(value[f"{m} over the SFT baseline"] for m in ("T0", "FLAN")) < 50


def test_instructgpt_agreement(instructgpt):
    value, spread = instructgpt["value"], instructgpt["plus_minus"]
    train, heldout = "training labelers among themselves", "held-out labelers among themselves"
    assert value[train] + spread[train] < value[heldout] - spread[heldout]
    # the reward model agrees with its labelers about as often as they agree with each other
    assert value["accuracy on labelers of its training set"] == pytest.approx(value[train], abs=spread[train])
    drop = value["accuracy on labelers of its training set"] - value["accuracy on held-out labelers"]
    assert drop == pytest.approx(2.8)
    least, most = (value[f"{w} responses ranked at once"] for w in ("fewest", "most"))
    assert (least * (least - 1) / 2, most * (most - 1) / 2, 64 * most * (most - 1) / 2) == (6, 36, 2304)


# --- what can be wrong with the files ---


def test_unknown_name(one_sentence):
    with one_sentence("'simpo'", "simpo_main", "instructgpt"):
        papers.table("simpo")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    folder = tmp_path / "papers"
    shutil.copytree(papers.FOLDER, folder)
    monkeypatch.setattr(papers, "FOLDER", folder)
    return folder / "simpo_main.csv"


def test_missing_file(copied, one_sentence):
    copied.unlink()
    with one_sentence("simpo_main.csv is missing", "git checkout"):
        papers.table("simpo_main")


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda lines: [], ""),
        (lambda lines: lines[:1], "no lines"),
        (lambda lines: lines[:-1], "199 rows"),
        (lambda lines: [*lines[:-1], lines[-1][:12]], ""),
        (lambda lines: [*lines[:-1], lines[-1].rstrip("\n")], "cut short"),
        (lambda lines: [*lines[:-1], lines[1]], "twice"),
        (lambda lines: [x.replace(",8.4,", ",eight,") for x in lines], ""),
        (lambda lines: [x.replace(",8.4,", ",,") for x in lines], "no 'value'"),
        (lambda lines: [x.replace("setting,", "place,") for x in lines], "'setting'"),
        (lambda lines: [x.replace(",page", ",seite") for x in lines], "'page'"),
        (lambda lines: [x.replace("Table 4,,", "Table 4,six,", 1) for x in lines], ""),
        (lambda lines: ["\0\1" * 50 + "\n"], ""),
        (lambda lines: ["<html>not found</html>\n"], ""),
    ],
)
def test_damaged_file(copied, one_sentence, damage, says):
    lines = copied.read_text(encoding="utf-8").splitlines(keepends=True)
    copied.write_text("".join(damage(lines)), encoding="utf-8")
    with one_sentence("simpo_main.csv", says, "git checkout data/papers/simpo_main.csv"):
        papers.table("simpo_main")


def test_a_folder_in_place_of_the_file(copied, one_sentence):
    copied.unlink()
    copied.mkdir()
    with one_sentence("simpo_main.csv", "git checkout"):
        papers.table("simpo_main")
