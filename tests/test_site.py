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


MARK = {kind: {"slideshow": {"slide_type": kind}} for kind in ("slide", "skip", "notes", "fragment", "-")}


def test_marked_cells_alone_make_slides(deck):
    found = deck(
        markdown("# before the first mark", **MARK["fragment"]),
        markdown("# One", **MARK["slide"]),
        markdown("left out", **MARK["skip"]),
        markdown("left out"),
        code("left_out()", printed("left out"), **MARK["-"]),
        markdown("spoken\n\ntoo", **MARK["notes"]),
        code("f()", printed("seen"), **MARK["fragment"]),
        markdown("its end\n\n## Two\n\nof two", **MARK["fragment"]),
        markdown("# Three", **MARK["slide"]),
    )
    assert len(found) == 3 and "<h2>Two</h2>" in found[1][0] and "of two" in found[1][0]
    assert "its end" in found[0][0] and "<h1>Three</h1>" in found[2][0]
    one, notes = found[0]
    assert "<h1>One</h1>" in one and "f()" in one and "seen" in one
    assert "spoken" in notes and "too" in notes and "spoken" not in one
    assert "left out" not in str(found) and "left_out" not in str(found) and "before" not in str(found)


def test_of_a_cell_stands_on_the_slide_what_is_read_from_afar(deck):
    found = deck(
        markdown("# One\n\nfirst $x<y$\n\nsecond\n\nleads in\n\n- a list\n\n$$E=mc^2$$", **MARK["slide"]),
        markdown("third\n\n**Predict.** What?\n\nfourth\n\n> a box", **MARK["fragment"]),
        code("short()", printed("<script>alert(1)</script>\n"), **MARK["fragment"]),
        code("\n".join(["long()"] * 9), printed("its output"), **MARK["fragment"]),
        code("plot()", picture(), **MARK["fragment"]),
        markdown("## Exercise 1\n\nthe task\n\nits arguments", **MARK["fragment"]),
        markdown("do it\n\n<details><summary>Hint 1</summary>\n\nthe hint\n\n</details>", **MARK["fragment"]),
    )
    one, notes = ("".join(parts) for parts in zip(*found, strict=True))
    seen = (
        "<h1>One</h1>",
        "first",
        "x&lt;y",
        "leads in",
        "a list",
        "E=mc^2",
        "third",
        "What?",
        "a box",
        "short()",
        "its output",
    )
    assert all(
        part in one for part in (*seen, "data:image/png;base64,iVBORw0KGgo=", "do it", "its arguments")
    )
    assert "second" in notes and "fourth" in notes and "second" not in one and "fourth" not in one
    assert "long()" not in one and "plot()" not in one
    assert "<script>alert" not in one and "&lt;script&gt;alert" in one
    assert "the hint" not in one + notes and "Hint 1" not in one + notes


def test_every_notebook_has_a_deck(deck, tmp_path):
    slides.make(BOOKS, tmp_path)
    assert [p.stem for p in sorted(tmp_path.glob("*.html"))] == [p.stem for p in BOOKS]
    assert site.broken(tmp_path) == []
    for path in BOOKS:
        page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            text, shown = "".join(cell["source"]), slides.mark_of(cell) in slides.SHOWN
            if cell["cell_type"] == "markdown" and re.match("##? ", text):
                assert shown, f"{path.name}: a section without a slide: {text[:60]}"
            if shown:
                tells = "BEGIN SOLUTION" in text or re.match(r"check\(\S+, (?!None)", text)
                assert not tells, (path.name, text[:60])
        pictures = [c for c in cells if any(k == "image" for k, _ in slides.outputs_of(c))]
        assert any(slides.mark_of(c) in slides.SHOWN for c in pictures), f"{path.name} shows no figure"
        assert 12 <= page.count("<section>") <= 60, (path.name, page.count("<section>"))
        assert "<details" not in page and "Hint 1" not in page
