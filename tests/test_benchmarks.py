"""The harness of benchmarks/ on tiny sizes: every participant takes its turns, and the table says what they did."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import run
import where
import work
from work import Size

TINY = Size(pairs=4, passed=4, width=32, layers=1, vocabulary=64, prompts=8, episodes=8, threads=1)


def test_turns_alternate_and_both_do_the_same_work(tmp_path):
    pytest.importorskip("trl")
    participants = {"ours": "ours dpo", "TRL, reference precomputed": "trl dpo precomputed"}
    with open(tmp_path / "log.txt", "w") as log:
        rows = pd.DataFrame(run.measure(participants, TINY, 2, log))
    rows["work"], rows["size"] = "DPO", json.dumps(dataclasses.asdict(TINY))
    for name in participants:
        mine = rows[rows.participant == name]
        assert (mine.kind == "step").sum() >= 2 and (mine.kind == "reference").sum() == 3
        assert (mine.units == 4).all() and (mine.seconds > 0).all() and (mine.memory > 100).all()
    order = rows[rows.kind == "step"].participant.tolist()[-3:]
    assert sorted(order) == sorted([*participants, "matmul"])
    table = run.summary(rows).set_index("work")
    whole, steps = table.loc["DPO, reference precomputed in both, one epoch"], table.loc["DPO, steps alone"]
    assert 0 < whole.ours_a_second < steps.ours_a_second and 0 < whole.share_of_limit < 1
    assert steps.ratio == pytest.approx(steps.ours_a_second / steps.trl_a_second)


class Enough(Exception):
    pass


@pytest.mark.parametrize("name", ["sft", "simpo", "orpo", "reward model", "ppo", "generation"])
def test_our_works(name, monkeypatch):
    monkeypatch.setattr(work.training, "set_threads", lambda threads=None: None)  # the tests have set theirs
    done = []

    def turns(units=None, kind="step"):
        done.append(units)
        if sum(u is not None for u in done) == 2:
            raise Enough

    with pytest.raises(Enough):
        work.ours(name, TINY, turns)
    expected = {"sft": 8, "ppo": 8}.get(name, 4)
    assert done[-1] == expected or (name == "generation" and 8 <= done[-1] <= 8 * 40)


def made_up(size, **seconds):
    """Turns of DPO that took so long each; 8 pairs a turn, reference passes a quarter as long."""
    rows = []
    for name, times in seconds.items():
        rows += [
            {"participant": name, "kind": "step", "seconds": s, "units": 8, "memory": 100} for s in times
        ]
        if name != "TRL":
            rows += [
                {"participant": name, "kind": "reference", "seconds": times[0] / 4, "units": 8, "memory": 1}
            ]
    rows += [{"participant": "matmul", "kind": "step", "seconds": 1.0, "units": 1e11}]
    return [{"work": "DPO", "size": json.dumps(dataclasses.asdict(size)), **row} for row in rows]


def test_summary_takes_medians_and_adds_the_reference_pass():
    names = {"ours": [1, 2, 3], "TRL": [4, 8, 6], "TRL, reference precomputed": [4, 4, 8]}
    table = run.summary(pd.DataFrame(made_up(Size(), **names))).set_index("work")
    steps = table.loc["DPO, steps alone"]
    assert steps.ours_a_second == 4 and steps.trl_a_second == 2 and steps.ratio == 2
    assert (steps.ratio_low, steps.ratio_high) == (2, 4)
    whole = table.loc["DPO, reference precomputed in both, one epoch"]
    assert whole.ours_a_second == pytest.approx(8 / 2.25) and whole.trl_a_second == pytest.approx(8 / 5)
    assert table.loc["DPO, as each ships it, one epoch"].trl_a_second == pytest.approx(8 / 6)
    assert steps.share_of_limit == pytest.approx(4 * run.flops_a_unit("DPO", Size()) / 1e11)


def test_flops_against_torch_counter():
    """The formula counts what PyTorch's own counter sees in the products of one unpadded sequence."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size = Size(width=64, layers=2, vocabulary=128)
    policy = work.policy_of(size, work.tokenizer_of(size))
    ids = torch.arange(30)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = policy.base_model(ids, use_cache=False).last_hidden_state
        policy.get_output_embeddings()(hidden[:, 7:29])
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if "attention" not in str(op))
    attention = 2 * 4 * 64 * 30 * 31 / 2  # of the formula: causal, half of the square
    assert run.forward_flops(size, 8, 22) - attention == linear


def test_growth_and_figure():
    rows = []
    for changed in ({}, {"pairs": 8}, {"pairs": 64}, {"longest": 80}, {"width": 512}):
        names = {"ours": [1.0, 1.0], "TRL": [2.0, 2.0], "TRL, reference precomputed": [2.0, 2.0]}
        rows += made_up(Size(**changed), **names)
    table = run.summary(pd.DataFrame(rows))
    grown = run.growth_of(table)
    assert grown[grown.changed == "pairs"].value.tolist() == [8, 32, 64]
    assert (grown.trl_seconds == 2 * grown.ours_seconds).all() and not math.isnan(grown.ours_mb.sum())
    assert len(run.figure_of(table).axes) == 7
    assert run.table_text(table).count("\n") == 1 + len(table)


def test_where_the_time_goes(monkeypatch):
    monkeypatch.setattr(work.training, "set_threads", lambda threads=None: None)
    shares = where.profiled("simpo", dataclasses.replace(TINY, width=64, layers=2), 2)
    assert shares.sum() == pytest.approx(1) and shares["matrix products"] > 0.02
    assert {"activation", "layer norm", "attention"} <= set(shares.index)
    assert where.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert where.kind_of("aten::unheard_of") == "everything else"
