"""The site and the slides: the map from papers to code is true, links lead somewhere, decks hold what they should."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "site" / "make.py").exists():
    pytest.skip("the site's sources are not here", allow_module_level=True)
sys.path.append(str(ROOT / "site"))

import importlib

import make as site
import paper_to_code
import slides

from rlhf_edu import losses

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def function_of(name):
    module, name = name.split(".")
    return getattr(importlib.import_module(f"rlhf_edu.{module}"), name)


# --- the map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "formula", "name"), paper_to_code.EQUATIONS)
def test_the_map_is_true(where, formula, name):
    source = inspect.getsource(function_of(name))
    line, found = paper_to_code.source_of(name)
    assert found.strip() in source and inspect.getsourcelines(function_of(name))[1] == line
    if name.startswith("losses.") and re.search(r"eq\.|Table", where):
        assert where.partition(" (")[0].partition(", sign")[0] in source, (
            "the function itself names no such equation"
        )
    assert any("::" in test for test in paper_to_code.tests_of(name)), "no test"
    used = paper_to_code.cells_that_use(BOOKS)
    assert paper_to_code.cells_of(name.split(".")[1], used)[1], "no notebook uses it"


def test_every_loss_and_every_equation_of_the_package_is_in_the_map():
    mapped = {name for *_, name in paper_to_code.EQUATIONS}
    ours = {f"losses.{n}" for n, f in vars(losses).items() if n.endswith("_loss") and inspect.isfunction(f)}
    assert len(ours) >= 16 and ours <= mapped
    said = " ".join(where for where, *_ in paper_to_code.EQUATIONS)
    for name in ("losses", "advantages"):
        text = (ROOT / "rlhf_edu" / f"{name}.py").read_text(encoding="utf-8")
        for paper, number in re.findall(r"# .*?(\w+) eq\. (\d+)", text):
            assert re.search(rf"{paper}\b.*? eq\. (?:\d+ and )?{number}", said), (paper, number)


def test_the_map_sees_what_python_reads():
    assert paper_to_code.names_in("y = losses.dpo_loss(x)") == {"losses", "dpo_loss", "x"}
    assert "dpo_loss" not in paper_to_code.names_in("def f():\n    'dpo_loss'  # dpo_loss\n    dpo_loss = 1")
    assert "rrhf_loss" in paper_to_code.names_in("zoo.GRID") and "rrhf_loss" not in paper_to_code.names_in(
        "GRID"
    )
    assert "dpo_loss" in paper_to_code.names_in("%time dpo_loss(x)")  # no Python: its words


# --- the site ---------------------------------------------------------------------------------------------------


def test_every_card_says_its_minutes():
    rows = site.minutes(BOOKS).strip().split("\n")[2:]
    assert len(rows) == len(BOOKS)
    for row in rows:
        _, title, said, exercises, total, _ = (part.strip() for part in row.split("|"))
        assert re.search(r"\d+ minutes|\b1 minute\b", said), title
        assert int(exercises) >= 4 and int(total) >= 5 * int(exercises) // 2, title


def test_cells_are_numbered_in_order(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<div class="cell docutils">a<div class="cell_input">x</div></div><div class="cell">b</div>'
    )
    assert site.number_the_cells(page) == 2
    assert page.read_text() == (
        '<div id="code-1" class="cell docutils">a<div class="cell_input">x</div></div><div id="code-2" class="cell">b</div>'
    )


def test_broken_links_and_things_from_a_network_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        "<h1 id='here'>x</h1><a href='#here'></a><a href='b.html#there'></a><a href='#gone'></a>"
        "<a href='https://arxiv.org/'></a><img src='data:image/png;base64,'><script src='https://cdn.example/x.js'></script>"
        "<link rel='stylesheet' href='lost.css'>"
    )
    (tmp_path / "b.html").write_text("<p id='there'></p><a href='c.html'></a>")
    (tmp_path / "style.css").write_text("a { background: url(https://example.org/x.png) }")
    assert site.broken(tmp_path) == [
        "a.html loads https://cdn.example/x.js",
        "a.html: #gone leads nowhere",
        "a.html: lost.css leads nowhere",
        "b.html: c.html leads nowhere",
        "style.css loads https://example.org/x.png",
    ]


# --- slides -----------------------------------------------------------------------------------------------------


def markdown(text, **metadata):
    return {"cell_type": "markdown", "source": text, "metadata": metadata}


def code(text, *outputs, **metadata):
    return {"cell_type": "code", "source": text, "metadata": metadata, "outputs": list(outputs)}


def picture(text="a figure"):
    return {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=", "text/plain": text}}


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


@pytest.fixture
def deck():
    pytest.importorskip("markdown_it", reason="no Markdown parser: pip install -e '.[dev]'")
    pytest.importorskip("mdit_py_plugins", reason="no formulas: pip install -e '.[dev]'")
    pytest.importorskip("sphinxcontrib.katex", reason="no KaTeX: pip install -e '.[dev]'")

    def make(*cells):
        page = slides.deck({"cells": list(cells)}, "a <b> name")
        assert not re.search(r"""(?:src|href)=['"]?https?:""", page.replace("<a href", "")), (
            "something from a network"
        )
        assert "<title>a &lt;b&gt; name</title>" in page
        return re.findall(
            r"<section><div class='fit'>(.*?)</div><aside>(.*?)</aside></section>", page, re.DOTALL
        )

    return make


def test_headings_begin_slides_and_solutions_stay_away(deck):
    found = deck(
        markdown("# One\n\nfirst $x<y$\n\nsecond\n\n- a list\n\n$$E=mc^2$$"),
        code("short()", printed("<script>alert(1)</script>\n")),
        code("\n".join(["long()"] * 9), picture()),
        markdown(
            "## Exercise\n\ndo it\n\n<details><summary>Hint 1</summary>\n\nthe hint\n\n</details>\n\nafter"
        ),
        code("### BEGIN SOLUTION\nsecret()", tags=["solution"]),
    )
    (one, notes), *more = found
    assert all(part in one for part in ("<h1>One</h1>", "first", "a list", "E=mc^2", "x&lt;y", "short()"))
    assert "second" in notes and "second" not in one
    whole = "".join(slide + said for slide, said in found)
    assert "<script>alert" not in whole and "&lt;script&gt;alert" in whole
    assert "long()" not in whole and "data:image/png;base64,iVBORw0KGgo=" in whole
    assert "secret" not in whole and "the hint" not in whole and "Hint 1" not in whole
    assert "do it" in more[-1][0] and "after" in more[-1][1]


def test_marks_of_the_cells_come_first(deck):
    mark = {kind: {"slideshow": {"slide_type": kind}} for kind in ("slide", "skip", "notes", "fragment")}
    found = deck(
        markdown("# before the first mark"),
        markdown("# One\n\ntext\n\nmore", **mark["slide"]),
        markdown("left out", **mark["skip"]),
        markdown("spoken", **mark["notes"]),
        code("\n".join(["long()"] * 9), printed("seen"), **mark["fragment"]),
        markdown("# Two", **mark["slide"]),
    )
    assert len(found) == 2
    assert "more" in found[0][0] and "long()" in found[0][0] and "spoken" in found[0][1]
    assert "left out" not in str(found) and "before the first mark" not in str(found)


def test_what_does_not_fit_goes_on_under_the_same_heading(deck):
    found = deck(markdown("## Figures"), *[code("f()", picture(str(n))) for n in range(3)])
    assert [re.findall(r"alt='(\d)'", slide) for slide, _ in found] == [["0"], ["1"], ["2"]]
    assert all("<h2>Figures</h2>" in slide for slide, _ in found)


def test_every_notebook_has_a_deck(deck, tmp_path):
    slides.make(BOOKS, tmp_path)
    assert [p.stem for p in sorted(tmp_path.glob("*.html"))] == [p.stem for p in BOOKS]
    assert site.broken(tmp_path) == []
    for path in BOOKS:
        page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sections = [
            c for c in cells if c["cell_type"] == "markdown" and re.match("## ", "".join(c["source"]))
        ]
        assert page.count("<section>") >= len(sections) and "BEGIN SOLUTION" not in page
        assert "<details" not in page and "Hint 1" not in page
