"""The map from papers to code: equation -> function -> notebook cells -> tests.

Written here: which equation, what it says, which function it is. The rest is read from the code when the site is
built. tests/test_site.py holds it to the code: functions exist, every loss has a row, every row has a test.
"""

import ast
import collections
import functools
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEANS = r"a=s/\lvert y\rvert"
EQUATIONS = [  # where it stands, the formula that is executed, our function
    ("next-token loss of SFT", r"-s/\lvert y\rvert", "losses.sft_loss"),
    ("DPO eq. 2 (Bradley-Terry)", r"-\log\sigma(r_w-r_l)", "losses.reward_pair_loss"),
    ("InstructGPT eq. 1", r"-\tbinom K2^{-1}\sum_{w,l}\log\sigma(r_w-r_l)", "losses.reward_ranking_loss"),
    ("InstructGPT eq. 2, its first term", r"r-\beta\,(\log\pi_\theta-\log\pi_{\mathrm{ref}})", "ppo.roll_out"),
    ("InstructGPT eq. 2, its second term", r"-\gamma\,\mathbb E_{\mathrm{pretrain}}\log\pi_\theta(x)", "ppo.pretraining_loss"),
    ("PPO eq. 7", r"\max\!\big(-\rho A,\,-\mathrm{clip}(\rho,1-\epsilon,1+\epsilon)A\big)", "losses.ppo_policy_loss"),
    ("code of Ziegler et al. 2019", r"\tfrac12\max\!\big((v-R)^2,(v_{\mathrm{clipped}}-R)^2\big)", "losses.ppo_value_loss"),
    ("PPO, the truncated advantage estimate", r"A_t=\delta_t+\gamma\lambda A_{t+1},\ \delta_t=r_t+\gamma v_{t+1}-v_t", "advantages.gae"),
    ("Schulman's note on estimating KL", r"k_1=u,\ k_2=u^2/2,\ k_3=e^{-u}-1+u,\ u=\log\pi-\log\pi_{\mathrm{ref}}", "advantages.kl_estimates"),
    ("code of Ziegler et al. 2019", r"(A-\bar A)/\sqrt{\mathrm{var}A}", "advantages.whiten"),
    ("Ziegler et al. 2019, adaptive KL", r"\beta\leftarrow\beta\,\big(1+\mathrm{clip}(\mathrm{KL}/\mathrm{target}-1,\pm0.2)\,n/\mathrm{horizon}\big)", "advantages.AdaptiveKL"),
    ("DPO eq. 4", r"\pi^*\propto\pi_{\mathrm{ref}}\,e^{r/\beta}", "evaluate.tilted_frontier"),
    ("DPO eq. 7", r"-\log\sigma(\beta h)", "losses.dpo_loss"),
    ("cDPO note eq. 3", r"-(1-\epsilon)\log\sigma(\beta h)-\epsilon\log\sigma(-\beta h)", "losses.dpo_loss"),
    ("IPO eq. 17", r"\big(h-\tfrac1{2\tau}\big)^2", "losses.ipo_loss"),
    ("SimPO Table 3, KTO row, sign corrected", r"\lambda_D\big(1-\sigma(\beta(s_w-\rho_w-z_0))\big)+\lambda_U\big(1-\sigma(\beta(z_0-s_l+\rho_l))\big)", "losses.kto_loss"),
    ("SimPO Table 3, R-DPO row", r"-\log\sigma\big(\beta h+\alpha(\lvert y_w\rvert-\lvert y_l\rvert)\big)", "losses.rdpo_loss"),
    ("SimPO Table 3, CPO row", r"-\log\sigma\big(\beta(s_w-s_l)\big)-\lambda s_w", "losses.cpo_loss"),
    ("SimPO Table 3, SLiC-HF row", r"\max(0,\delta-s_w+s_l)-\lambda s_w", "losses.slic_hf_loss"),
    ("SimPO Table 3, RRHF row", r"\max(0,a_l-a_w)-\lambda s_w", "losses.rrhf_loss"),
    ("ORPO eq. 7, with its SFT term", r"-a_w-\lambda\log\sigma\Big(\log\frac{e^{a_w}}{1-e^{a_w}}-\log\frac{e^{a_l}}{1-e^{a_l}}\Big)", "losses.orpo_loss"),
    ("SimPO eq. 6", r"-\log\sigma\big(\beta(a_w-a_l)-\gamma\big)", "losses.simpo_loss"),
    ("DPO sec. 6, Preferred-FT", r"-s_w", "losses.preferred_ft_loss"),
    ("DPO sec. 6, Unlikelihood", r"-(s_w-\alpha s_l)", "losses.unlikelihood_loss"),
    ("KL of whole responses", r"\mathbb E_{y\sim\pi_\theta}\,[s-\rho]", "evaluate.sequence_kl"),
    ("Best-of-N and the bound on its KL", r"\mathrm{KL}\le\log N-(N-1)/N", "evaluate.best_of_n"),
]  # fmt: skip
SHOWN = 3  # cells of a notebook, tests of a function


def names_in(code: str) -> set[str]:
    """Names and attributes that a piece of Python reads; all its words where it does not parse."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return set(re.findall(r"\w+", code))
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    if re.search(r"\bzoo\.GRID\b", code):  # the table of methods holds their losses
        found |= names_in((ROOT / "rlhf_edu" / "zoo.py").read_text(encoding="utf-8").partition("GRID")[2])
    return found


def cells_that_use(books: list[Path]) -> dict[str, dict[Path, list[int]]]:
    """name -> notebook -> numbers of the code cells that read it, as JupyterLab counts them after Run All."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in books:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [
            "".join(c["source"]) for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()
        ]
        for number, text in enumerate(code, 1):
            for name in names_in(text):
                found[name][path].append(number)
    return found


@functools.cache
def tests_that_use() -> dict[str, list[str]]:
    """name -> "file::test", a file alone where the name stands outside of its tests."""
    found = collections.defaultdict(list)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            name = getattr(node, "name", "")
            label = f"{path.name}::{name}" if name.startswith("test_") else path.name
            for used in names_in(ast.get_source_segment(text, node)):
                if label not in found[used]:
                    found[used].append(label)
    return found


@functools.cache
def callers() -> dict[str, set[str]]:
    """name -> functions of the package that read it."""
    found = collections.defaultdict(set)
    for path in sorted((ROOT / "rlhf_edu").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                for name in names_in(ast.get_source_segment(text, node)) - {node.name}:
                    found[name].add(node.name)
    return found


def cells_of(name: str, used: dict) -> tuple[str, dict[Path, list[int]]]:
    """(the name that the cells read, its cells): where none reads it, those of the function that calls it."""
    names = [name]
    for one in names:  # grows while it is walked
        if used[one] or len(names) > 20:
            return one, used[one]
        names += sorted(callers()[one] - set(names))
    return name, {}


def source_of(function: str) -> tuple[int, str]:
    """(line, source) of "module.name" of the package."""
    module, name = function.split(".")
    text = (ROOT / "rlhf_edu" / f"{module}.py").read_text(encoding="utf-8")
    node = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    first = min([node, *node.decorator_list], key=lambda n: n.lineno).lineno
    return first, "\n".join(text.split("\n")[first - 1 : node.end_lineno])


def tests_of(function: str) -> list[str]:
    """Its tests: those in the file of its module first, named tests before whole files."""
    module, name = function.split(".")
    home = f"test_{module}.py"
    return sorted(tests_that_use()[name], key=lambda t: ("::" not in t, not t.startswith(home), t))


def page(books: list[Path]) -> str:
    used = cells_that_use(books)
    lines = [
        "# From paper to code\n",
        "Each equation that the package executes, in the course's [notation](notation.md): the function that is it, the",
        "cells that use it (`[7]` is the seventh code cell), and tests that hold it. Cells and tests are read from the code",
        f"when the site is built. $h=(s_w-\\rho_w)-(s_l-\\rho_l)$ and ${MEANS}$.\n",
        "| equation and function | notebooks | tests |",
        "|---|---|---|",
    ]
    for where, formula, function in EQUATIONS:
        name = function.split(".")[1]
        read, of = cells_of(name, used)
        cells = [f"in `{read}`:"] * (read != name)
        for path, numbers in of.items():
            links = (f"<a href='notebooks/{path.stem}.html#code-{n}'>[{n}]</a>" for n in numbers[:SHOWN])
            cells.append(f"{path.stem[:2]} {' '.join(links)}{' …' * (len(numbers) > SHOWN)}")
        tests = tests_of(function)
        held = "<br>".join(f"`{t}`" for t in tests[:SHOWN]) + (
            f"<br>and {len(tests) - SHOWN} more" if len(tests) > SHOWN else ""
        )
        anchor = f"<a href='#{function.replace('.', '-')}'><code>{function}</code></a>"
        lines.append(f"| {where}<br>${formula}$<br>{anchor} | {'<br>'.join(cells)} | {held} |")
    lines.append("\n## The functions\n")
    for function in dict.fromkeys(f for *_, f in EQUATIONS):
        number, source = source_of(function)
        lines += [f"<span id='{function.replace('.', '-')}'></span>\n", f"### `{function}`\n"]
        lines += [f"`rlhf_edu/{function.split('.')[0]}.py`, line {number}\n", f"```python\n{source}\n```\n"]
    return "\n".join(lines) + "\n"
