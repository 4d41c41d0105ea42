"""The figures show the numbers they are given; the report says so, offline, whatever was written."""

import html.parser
import math
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from rlhf_edu import figures, report

NS = [1, 2, 4, 8]


def frontier_table(seed=0, extra=()):
    """Three points a run: KL 0 (the SFT policy), half of the run's KL, all of it."""
    runs = [
        ("DPO", "beta=1", 4.0, 0.8),
        ("DPO", "beta=0.1", 9.0, 0.95),
        ("PPO", "target=6", 8.0, 0.85),
        *extra,
    ]
    rows = [("SFT", "SFT", "", 0, 0.5, 0.0)]
    for method, knob, kl, reward in runs:
        values = ((0, 0.5, 0.0), (10, (reward + 0.5) / 2, kl / 2), (20, reward, kl))
        rows += [(f"{method} {knob}", method, knob, *value) for value in values]
    table = pd.DataFrame(rows, columns=["run", "method", "knob", "step", "reward", "kl"])
    return table.assign(seed=seed, reward_se=0.01, kl_se=0.1, length=30.0, ended=0.9, prompts=256)


def best_of_n_table(seed=0):
    kl = [math.log(n) - (n - 1) / n for n in NS]
    return pd.DataFrame({"seed": seed, "n": NS, "reward": [0.5, 0.7, 0.8, 0.9], "reward_se": 0.02, "kl": kl})


def length_tables(seed=0):
    """Margins that grow with the length difference by the method's slope; log-probs that rise with it."""
    generator = np.random.default_rng(seed)
    margins, lengths = [], []
    for method, slope in (("SFT", 0.0), ("SimPO", 0.02), ("SimPO w/o LN", 3.0), ("DPO", 0.2)):
        difference = generator.integers(-20, 21, 400)
        margin = slope * difference + generator.normal(0, 1, 400)
        margins.append(
            pd.DataFrame({"seed": seed, "method": method, "length_difference": difference, "margin": margin})
        )
        size = generator.integers(5, 49, 300)
        logp = -3 + slope / 100 * size + generator.normal(0, 0.5, 300)
        lengths.append(pd.DataFrame({"seed": seed, "method": method, "length": size, "logp_per_token": logp}))
    return pd.concat(margins), pd.concat(lengths)


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn_lines(axes):
    """{(marker, rounded x, rounded y)} of every line of the axes."""

    def rounded(values):
        return tuple(np.round(np.asarray(values, dtype=float), 6))

    return {(line.get_marker(), rounded(line.get_xdata()), rounded(line.get_ydata())) for line in axes.lines}


# --- seeds and bins --------------------------------------------------------------------------------


def test_seed_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    assert figures.seed_interval([1, 2, 3]) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-5)
    mean, low, high = figures.seed_interval(pd.Series([0.7], index=[5]))
    assert mean == 0.7 and math.isnan(low) and math.isnan(high)
    assert figures.interval_text([1, 2, 3]) == "2.00 [-0.48, 4.48]"
    assert figures.interval_text([0.7]) == "0.70"


def test_no_seed_has_no_interval(one_sentence):
    with one_sentence("at least one value"):
        figures.seed_interval([])


def test_bins_by_hand():
    """[-10, 0) holds -1 alone; [0, 10) holds 0, 2 and 9: margins 1, 2, 6, mean 3, error sqrt(7 / 3)."""
    margins = pd.DataFrame(
        {"seed": 0, "method": "DPO", "length_difference": [0, 2, 9, -1, 10], "margin": [1.0, 2, 6, -5, 100]}
    )
    binned = figures.bin_margins(margins, edges=[-10, 0, 10])
    columns = ["seed", "method", "bin_low", "bin_high", "length_difference", "margin", "margin_se", "n"]
    assert list(binned.columns) == columns
    assert binned[["bin_low", "bin_high", "n"]].values.tolist() == [[-10, 0, 1], [0, 10, 3]]  # 10 is outside
    assert binned["margin"].tolist() == [-5, 3]
    assert binned["length_difference"].tolist() == pytest.approx([-1, 11 / 3])
    assert math.isnan(binned["margin_se"][0]) and binned["margin_se"][1] == pytest.approx(math.sqrt(7 / 3))


def test_default_bins_are_the_same_whatever_the_data():
    """5 tokens wide, centred on multiples of 5, by seed and method, duplicate index labels and all."""
    part = pd.DataFrame(
        {"seed": 0, "method": "SFT", "length_difference": [-3, 2, 3, 12], "margin": [1.0, 2, 3, 4]}
    )
    binned = figures.bin_margins(pd.concat([part, part.assign(seed=1), part.iloc[:2].assign(method="DPO")]))
    one = binned[(binned["seed"] == 1) & (binned["method"] == "SFT")]
    assert one[["bin_low", "bin_high", "n"]].values.tolist() == [
        [-7.5, -2.5, 1], [-2.5, 2.5, 1], [2.5, 7.5, 1], [7.5, 12.5, 1]]  # fmt: skip
    assert binned.loc[binned["method"] == "DPO", "bin_low"].tolist() == [-7.5, -2.5]


# --- the frontier ----------------------------------------------------------------------------------


def test_frontier_draws_its_numbers():
    table = frontier_table().sample(
        frac=1, random_state=0
    )  # rows in any order are joined in the order of steps
    figure = figures.frontier(table, best_of_n_table())
    (axes,) = figure.axes
    assert "nats" in axes.get_xlabel() and "p(positive)" in axes.get_ylabel()
    heading = axes.get_title(loc="left") + " ".join(text.get_text() for text in axes.texts)
    for part in ("ours, mini scale", "256 held-out prompts", "seed 0", "standard error", "β=0.1", "N=8"):
        assert part in heading
    assert legend_texts(figure) == ["SFT", "PPO", "DPO", "Best-of-N (KL bound)"]
    lines = drawn_lines(axes)
    assert (figures.MARKERS["DPO"], (0.0, 4.5, 9.0), (0.5, 0.725, 0.95)) in lines  # a run
    assert (figures.MARKERS["DPO"], (9.0,), (0.95,)) in lines  # its end
    bound = tuple(np.round([math.log(n) - (n - 1) / n for n in NS], 6))
    assert ("x", bound, (0.5, 0.7, 0.8, 0.9)) in lines
    bars = [c for c in axes.containers if isinstance(c, ErrorbarContainer) and c.get_label() == "PPO"]
    up, across = (segments.get_segments()[0] for segments in reversed(bars[0][2]))
    assert up[:, 1].tolist() == pytest.approx([0.84, 0.86]) and across[:, 0].tolist() == pytest.approx(
        [7.9, 8.1]
    )
    assert bars[0][0].get_color() == figures.METHOD_COLOURS["PPO"]


def test_frontier_draws_the_band_pale_and_behind():
    band = pd.concat([frontier_table(seed) for seed in (1, 2, 3)])  # index labels repeat
    figure = figures.frontier(
        frontier_table(), None, band, pd.concat([best_of_n_table(s) for s in (1, 2, 3)])
    )
    assert "shipped, 3 seeds" in legend_texts(figure)
    pale = [
        x for x in figure.axes[0].lines if x.get_zorder() == 1 and x.get_marker() == figures.MARKERS["DPO"]
    ]
    assert len(pale) == 1 and pale[0].get_alpha() < 0.5 and pale[0].get_linestyle() == "None"
    assert sorted(pale[0].get_xdata()) == sorted(band.loc[band["method"] == "DPO", "kl"])
    dashed = [x for x in figure.axes[0].lines if x.get_zorder() == 1 and x.get_linestyle() == "--"]
    assert len(dashed) == 3


@pytest.mark.parametrize("far, said", [(1, "(1 point off scale)"), (2, "(2 points off scale)")])
def test_the_legend_counts_the_points_of_the_band_that_lie_off_scale(far, said):
    extra = [("Unlikelihood", f"alpha={i}", 100.0 + i, 0.4) for i in range(far)]
    band = frontier_table(1, extra).query("kl < 20 or kl >= 100")  # without the points at half of the KL
    assert f"shipped, seed 1\n{said}" in legend_texts(figures.frontier(frontier_table(), None, band))


def test_a_run_off_scale_is_named_and_the_rest_stays_readable():
    table = frontier_table(
        extra=[("Unlikelihood", "alpha=1", 312.4, 0.4), ("Unlikelihood", "alpha=5", 540.0, 0.3)]
    )
    figure = figures.frontier(table, scale="gpt2")
    (axes,) = figure.axes
    assert 9 < axes.get_xlim()[1] < 11
    assert "Unlikelihood: off scale,\nKL 312, 540" in legend_texts(figure)
    (edge,) = [line for line in axes.lines if line.get_marker() == ">"]
    assert set(edge.get_xdata()) == {axes.get_xlim()[1]} and list(edge.get_ydata()) == [0.4, 0.3]
    assert not edge.get_clip_on()
    assert "gpt2 scale" in axes.get_title(loc="left")
    assert not [text for text in legend_texts(figures.frontier(frontier_table())) if "off scale" in text]


def test_figures_leave_nothing_in_pyplot_and_show_themselves():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = figures.frontier(frontier_table())
    assert plt.get_fignums() == []
    assert figure._repr_png_().startswith(b"\x89PNG")


# --- length ----------------------------------------------------------------------------------------


def test_length_draws_bins_and_points():
    margins, lengths = length_tables()
    few = pd.DataFrame({"seed": 0, "method": "DPO", "length_difference": [40] * 4, "margin": [1.0, 2, 3, 4]})
    margins = pd.concat([margins, few])
    rho = pd.DataFrame({"seed": 0, "method": ["SimPO", "SimPO w/o LN"], "rho": [0.12, 0.345], "n": 300})
    figure = figures.length(margins, lengths, rho)
    left, *right = figure.axes
    assert "SimPO's reward" in left.get_ylabel() and "tokens" in left.get_xlabel()
    assert legend_texts(figure) == ["SFT", "DPO", "SimPO", "SimPO w/o LN"]
    assert "ours, mini scale, seed 0" in figure.get_suptitle()
    expected = figures.bin_margins(margins)
    expected = expected[(expected["method"] == "DPO") & (expected["n"] >= 5)]
    (line,) = [c[0] for c in left.containers if c.get_label() == "DPO"]
    assert list(line.get_xdata()) == pytest.approx(list(expected["length_difference"]))
    assert list(line.get_ydata()) == pytest.approx(list(expected["margin"]))
    assert 17 < max(line.get_xdata()) < 23  # four pairs make no point
    assert any(set(x.get_ydata()) == {0} for x in left.lines)  # the zero line
    assert [a.get_title(loc="left").split(":")[0] for a in right] == ["SFT", "DPO", "SimPO", "SimPO w/o LN"]
    assert right[3].get_title(loc="left") == "SimPO w/o LN: ρ = 0.34"  # as given
    sft = lengths[lengths["method"] == "SFT"]
    own = sft["length"].corr(sft["logp_per_token"], method="spearman")
    assert right[0].get_title(loc="left") == f"SFT: ρ = {own:.2f}"  # not given: computed
    assert list(right[0].lines[0].get_xdata()) == list(sft["length"])
    assert list(right[0].lines[0].get_ydata()) == list(sft["logp_per_token"])


def test_length_shows_what_is_shipped():
    margins, lengths = length_tables()
    band = pd.concat([figures.bin_margins(length_tables(seed)[0]) for seed in (1, 2, 3)])
    rho = pd.DataFrame({"seed": [1, 2, 3], "method": "DPO", "rho": [0.1, 0.2, 0.3]})
    figure = figures.length(margins, lengths, None, band, rho)
    assert "shipped, 3 seeds (range)" in legend_texts(figure)
    assert "shipped, 3 seeds: 0.20 [-0.05, 0.45]" in [text.get_text() for text in figure.axes[2].texts]
    assert not any(text.get_text() for text in figure.axes[1].texts)  # nothing shipped for SFT
    pale = band[(band["method"] == "SimPO") & (band["n"] >= 5)].groupby("bin_low")["margin"]
    areas = [a.get_paths()[0].vertices for a in figure.axes[0].collections if a.get_alpha() == 0.18]
    ranges = [(v[:, 1].min(), v[:, 1].max()) for v in areas]
    assert any(r == pytest.approx((pale.min().min(), pale.max().max())) for r in ranges)


def test_length_with_two_methods_has_two_panels():
    margins, lengths = (t[t["method"].isin(["SimPO", "SFT"])] for t in length_tables())
    assert len(figures.length(margins, lengths).axes) == 3


def test_training_curves_draw_the_columns_that_are_there(one_sentence):
    short = pd.DataFrame({"step": [0, 1, 2], "loss": [np.nan, 0.7, 0.5], "kl": [0.0, np.nan, 2.0]})
    figure = figures.training_curves({"a": short, "b": short[["step", "loss"]]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "kl"]
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[1, 0.7], [2, 0.5]]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[0, 0], [2, 2]]
    assert legend_texts(figure) == ["a", "b"]
    with one_sentence("loss, accuracy, margin, kl"):
        figures.training_curves({"a": short[["step"]]})


# --- the report ------------------------------------------------------------------------------------


@pytest.fixture
def drawn_fast(monkeypatch):
    """Pictures cost seconds; where a test does not look at them, a stub stands for each."""
    monkeypatch.setattr(figures, "png", lambda figure, dpi=150: b"\x89PNG stub")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder, band = make_run(tmp_path_factory.mktemp("runs"))
    return report.write_report(folder, band)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(tmp_path):
    """(run folder, band folder) as a run of the main job leaves them."""
    folder, band = tmp_path / "my run", tmp_path / "band"
    (folder / "training").mkdir(parents=True)
    band.mkdir()
    points = frontier_table(extra=[("PPO-GT", "target=6", 7.0, 0.9)])
    margins, lengths = length_tables()
    rho = [("SFT", 0.1), ("SimPO", 0.3), ("SimPO w/o LN", 0.8), ("DPO", 0.6)]
    correlations = pd.DataFrame(rho, columns=["method", "rho"]).assign(seed=0, n=300)
    seeds = [correlations.assign(seed=s, rho=correlations["rho"] + 0.01 * s * s) for s in (1, 2, 3)]
    texts = [(r, p) for r in points["run"].unique() for p in ("The film", "NA")]
    samples = pd.DataFrame(texts, columns=["run", "prompt"]).assign(
        response=" was <script>alert('x')</script> & good"
    )
    samples.loc[0, "response"] = "null"
    tables = {
        folder / "frontier.csv": points,
        folder / "best_of_n.csv": best_of_n_table(),
        folder / "margins.csv": margins,
        folder / "lengths.csv": lengths,
        folder / "correlations.csv": correlations,
        folder / "samples.csv": samples.assign(reward=0.25),
        folder / "seconds.csv": pd.DataFrame(
            {"stage": ["comparisons", "DPO beta=1"], "seconds": [10.5, 20.25]}
        ),
        folder / "training" / "DPO_beta1.csv": pd.DataFrame({"step": [0, 1, 2], "loss": [np.nan, 0.7, 0.6]}),
        band / "frontier.csv": pd.concat([frontier_table(s) for s in (1, 2, 3)]),
        band / "best_of_n.csv": pd.concat([best_of_n_table(s) for s in (1, 2, 3)]),
        band / "correlations.csv": pd.concat(seeds),
        band / "margins_binned.csv": figures.bin_margins(pd.concat([length_tables(s)[0] for s in (1, 2, 3)])),
    }
    for path, table in tables.items():
        table.to_csv(path, index=False)
    config = (
        '{"command": "rlhf <b>", "scale": {"name": "smoke", "betas": [0.1, 1]}, "versions": {"torch": "2.9"}}'
    )
    (folder / "config.json").write_text(config)
    return folder, band


class Page(html.parser.HTMLParser):
    """Tags that open and close in order, the text, and everything a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.fetched, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "data", "action", "poster", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_holds_every_part_and_loads_nothing(rendered):
    assert rendered.name == "report.html" and list(rendered.parent.glob(".*")) == []  # no temporary file
    source = rendered.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == [] and page.tags.count("img") == 3  # frontier, length, training
    assert page.fetched and all(f.startswith("data:image/png;base64,") for f in page.fetched)
    assert (
        "http" not in re.sub(r"base64,[^\"]*", "", source)
        and "@import" not in source
        and "url(" not in source
    )
    assert "prefers-color-scheme" in source and "width=device-width" in source
    text = "\n".join(page.text)
    for part in (
        "starts at a mean oracle reward of 0.500 ± 0.010 (256 held-out prompts, seed 0)",
        "10 nats or less is DPO beta=0.1: 0.950 ± 0.010 at 9.0 nats",
        "PPO, at no more KL, is at 0.850 ± 0.010: DPO minus PPO is 0.100 ± 0.014",
        "Shipped, 3 seeds: DPO minus PPO within 10 nats is 0.10 [0.10, 0.10]",
        "(seed 0): SimPO 0.30, without length normalization 0.80, difference 0.50.",
        "shipped, 3 seeds: 0.65 [0.55, 0.75]",  # DPO: 0.61, 0.64, 0.69
        "0.59",  # DPO's rho in the paper
        "9.00 ± 0.10",
        "DPO beta=1, best of 5",
        "1.20",  # KL bound of Best-of-8
        "scale.betas",
        "versions.torch",
        "30.8",  # seconds together
    ):
        assert part in text, part


def test_report_escapes_what_models_and_users_wrote(rendered):
    source = rendered.read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "b" not in page.tags
    assert "&lt;script&gt;" in source and "&amp; good" in source and "rlhf &lt;b&gt;" in source
    cells = re.findall(r"<td>(.*?)</td>", source, flags=re.DOTALL)
    assert "NA" in cells and any(
        cell.startswith("null\np(positive) 0.25") for cell in cells
    )  # not read as missing


def test_samples_stand_side_by_side(rendered):
    """Of each method the run that ended with the highest reward: DPO beta=0.1, not beta=1."""
    source = rendered.read_text(encoding="utf-8")
    (head,) = re.findall(r"<tr><th>prompt</th>(.*?)</tr>", source)
    assert re.findall("<th>(.*?)</th>", head) == ["SFT", "PPO target=6", "PPO-GT target=6", "DPO beta=0.1"]


def test_a_partial_run_leaves_sections_out_and_says_so(run, drawn_fast):
    folder, _ = run
    for name in ("margins", "lengths", "correlations", "best_of_n", "samples", "seconds"):
        (folder / f"{name}.csv").unlink()
    (folder / "config.json").unlink()
    points = pd.read_csv(folder / "frontier.csv")
    points[points["method"] != "PPO"].to_csv(folder / "frontier.csv", index=False)
    source = report.write_report(folder).read_text(encoding="utf-8")
    headings = re.findall("<h2>(.*?)</h2>", source)
    assert headings == [
        "Reward against KL",
        "Where each run ended",
        "DPO against PPO at equal KL",
        "Training: DPO",
    ]
    assert "DPO or PPO was not run" in source
    assert "margins.csv, lengths.csv, correlations.csv" in source
    assert [p.name for p in report.write_figures(folder)] == ["frontier.png"]


def test_the_length_part_alone(run, drawn_fast):
    folder, band = run
    (folder / "frontier.csv").unlink()
    source = report.write_report(folder, band).read_text(encoding="utf-8")
    assert "<h2>Length</h2>" in source and "<h2>Reward against KL</h2>" not in source
    assert [p.name for p in report.write_figures(folder, band)] == ["length.png"]
    assert (folder / "length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, damage, parts",
    [
        ("frontier", lambda text: text.replace("kl_se", "nonsense"), ["lacks the column 'kl_se'"]),
        ("frontier", lambda text: text[: text.rindex("2")], ["row 13 has no 'prompts'"]),
        (
            "margins",
            lambda text: text + "0,SFT,x,1\n",
            ["string "],
        ),  # "Unable to parse string", "could not convert string": by release
        ("samples", lambda text: "", ["No columns"]),
        ("best_of_n", lambda text: text.splitlines()[0], ["it has no lines"]),
        ("lengths", lambda text: text + '"0,SFT', ["EOF inside string"]),
        ("seconds", lambda text: text + "a,b,c,d\n", ["Expected 2 fields"]),
    ],
)
def test_a_damaged_table_is_one_sentence(run, one_sentence, name, damage, parts):
    folder, band = run
    path = folder / f"{name}.csv"
    path.write_text(damage(path.read_text()))
    with one_sentence(f"reading {path} failed", "delete it and run the same command again", *parts):
        report.write_report(folder, band)
    assert not (folder / "report.html").exists()


def test_other_damage_is_one_sentence(run, one_sentence, tmp_path):
    folder, band = run
    (folder / "lengths.csv").rename(folder / "away.csv")
    with one_sentence("lengths.csv is missing", "run the same command again"):
        report.write_figures(folder, band)
    (folder / "away.csv").rename(folder / "lengths.csv")
    (band / "frontier.csv").write_text("a\n1\n")
    with one_sentence(str(band / "frontier.csv"), "git checkout -- "):
        report.write_report(folder, band)
    (folder / "config.json").write_text('{"scale"')
    with one_sentence(str(folder / "config.json"), "delete it"):
        report.write_report(folder)
    with one_sentence("holds no frontier.csv", "name a folder that a run wrote"):
        report.write_report(tmp_path)


def test_no_length_variation_is_no_error(run):
    """A smoke run may end no response: every length is the cap, and rho is undefined (NaN)."""
    folder, _ = run
    for name in ("margins", "correlations"):
        table = pd.read_csv(folder / f"{name}.csv")
        column, value = ("length_difference", 0) if name == "margins" else ("rho", math.nan)
        table.assign(**{column: value}).to_csv(folder / f"{name}.csv", index=False)
    assert "Rank correlation" not in report.summary(*report.load(folder)[:2])


def test_reward_at_kl():
    """The best point within each KL, over runs and steps, whatever the index labels; no row without one."""
    table = pd.concat([frontier_table(), frontier_table(extra=[("DPO", "beta=5", 4.5, 0.6)])])
    best = report.reward_at_kl(table, "DPO", [-1, 0, 3, 4, 100])
    assert best["kl_at_most"].tolist() == [0, 3, 4, 100]
    assert best["reward"].tolist() == [0.5, 0.65, 0.8, 0.95]
    assert best["run"].tolist()[1:] == ["DPO beta=1", "DPO beta=1", "DPO beta=0.1"]
    assert best["points"].tolist() == [5, 8, 10, 15]
    assert len(report.reward_at_kl(table, "KTO", [1, 2])) == 0


def test_equal_kl_stays_within_what_both_reach(run):
    """DPO reaches 9 nats and PPO, here, 4: the row "<= 4" is the last."""
    points = pd.read_csv(run[0] / "frontier.csv")
    points.loc[points["method"] == "PPO", "kl"] /= 2
    source = report.equal_kl(points, None)
    assert re.findall("<td>≤ (.*?)</td>", source) == ["0.5", "1", "2", "3", "4"]
    last = re.findall("<td>(.*?)</td>", source, flags=re.DOTALL)[-5:]
    assert last == ["0.800 ± 0.010\nDPO beta=1, best of 4", "0.850 ± 0.010\nPPO target=6, best of 3",
                    "0.700 ± 0.010\nPPO-GT target=6, best of 2", "-0.050 ± 0.014", "–"]  # fmt: skip
