"""A deck of slides for each notebook, one HTML file that needs no network: `make slides`.

    python site/slides.py [FOLDER]     default: build/slides

Only marked cells count (JupyterLab: Property Inspector, Slide Type): `slide` and `subslide` begin a slide, as headings do,
`fragment` goes on with it, `notes` are for the speaker (key n), all others are left out. Of a text its headings, first
paragraph, predictions, tasks, formulas, lists, tables and boxes stand on the slide, each with the sentence that leads in to
it; further paragraphs become notes. Of a code cell its outputs, with the code where that is short and only prints. Hints
never do. What is too high for a slide goes on under the same heading: the page measures that itself. Arrow keys, space or
a tap turn the page; printing gives one page a slide.
"""

import functools
import html
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN = ("slide", "subslide")
SHOWN = (*BEGIN, "fragment")
HEADINGS = ("h1", "h2", "h3")
PREDICTION = re.compile("<(strong|em)>(Predict|Write down|Before you)")
SHORT = 8  # lines of code that are shown
TEXT_LINES = 14  # of a printed output


@functools.cache
def markdown():
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    return parser.use(dollarmath_plugin, renderer=lambda text, _: html.escape(text), allow_digits=False)


def markdown_blocks(text: str) -> list[tuple[str, str]]:
    """(kind, html) of each block: "h1" to "h6", "paragraph", "math_block", "table", "bullet_list", ... No folded parts."""
    parser = markdown()
    tokens, blocks, start, folded = parser.parse(text), [], 0, False
    for place, token in enumerate(tokens):
        if token.level == 0 and token.nesting == 1:
            start = place
        elif token.level == 0:
            part = tokens[start if token.nesting == -1 else place : place + 1]
            if token.type == "html_block":
                opens, closes = token.content.count("<details"), token.content.count("</details")
                if opens or closes or folded:
                    folded = opens > closes or folded and not closes
                    continue
            if not folded:
                kind = token.tag if token.type.startswith("heading") else token.type.removesuffix("_close")
                blocks.append((kind, parser.renderer.render(part, parser.options, {})))
    return blocks


def outputs_of(cell: dict) -> list[tuple[str, str]]:
    """(kind, html) of what a cell shows: "image", "html", "printed"; what it prints in pieces is one."""
    shown, printed = [], ""

    def flush():
        nonlocal printed
        if printed.strip():
            lines = printed.strip("\n").split("\n")
            kept = "\n".join(lines[:TEXT_LINES]) + "\n…" * (len(lines) > TEXT_LINES)
            shown.append(("printed", f"<pre class='out'>{html.escape(kept)}</pre>"))
        printed = ""

    for output in cell.get("outputs", []):
        found = output.get("data", {})
        text = "".join(output.get("text", found.get("text/plain", "")))
        if "image/png" in found:
            flush()
            data = "".join(found["image/png"]).replace("\n", "")
            shown.append(
                ("image", f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{data}'>")
            )
        elif "text/html" in found:
            flush()
            shown.append(("html", f"<div class='out'>{''.join(found['text/html'])}</div>"))
        elif output.get("name") != "stderr":
            printed += text
            if output.get("output_type") != "stream":
                flush()
    flush()
    return shown


def code_of(cell: dict) -> str:
    source = "".join(cell["source"]).replace("# NBVAL_CHECK_OUTPUT\n", "").strip()
    return f"<pre class='code'>{html.escape(source)}</pre>"


def mark_of(cell: dict) -> str | None:
    return cell["metadata"].get("slideshow", {}).get("slide_type")


def blocks_of(cell: dict) -> list[tuple[str, str, bool]]:
    """(kind, html, whether it stands on the slide or is only said) of each block."""
    if cell["cell_type"] == "code":
        source, shown = "".join(cell["source"]), outputs_of(cell)
        hidden = (
            any(kind != "printed" for kind, _ in shown) or source.count("\n") >= SHORT or "import" in source
        )
        parts = "".join([code_of(cell)] * (not hidden) + [text for _, text in shown])
        return [("cell", f"<div class='cell'>{parts}</div>", True)] if parts else []
    blocks, paragraphs, task = [], 0, False
    found = markdown_blocks("".join(cell["source"]))
    for place, (kind, text) in enumerate(found):
        if kind in HEADINGS:
            paragraphs, task = 0, ">Exercise" in text
        paragraphs += kind == "paragraph"
        after = found[place + 1][0] if place + 1 < len(found) else "paragraph"
        leads_in = after not in (*HEADINGS, "paragraph", "hr", "blockquote") or text.rstrip().endswith(
            ":</p>"
        )
        said = kind == "paragraph" and paragraphs > 1 and not (task or leads_in or PREDICTION.search(text))
        if kind != "hr":
            blocks.append((kind, text, not said))
    return blocks


def slides_of(cells: list[dict]) -> list[dict]:
    """The slides that the marks of a notebook's cells make; a heading inside a cell begins one too."""
    slides = []
    for cell in cells:
        mark = mark_of(cell)
        if mark not in (*SHOWN, "notes") or not slides and mark not in BEGIN:
            continue
        begins = mark in BEGIN
        for kind, text, shown in blocks_of(cell):
            shown = shown and mark != "notes"
            full = not slides or any(k not in HEADINGS for k, _ in slides[-1]["blocks"])
            if shown and full and (begins or kind in HEADINGS):  # a heading alone needs no slide of its own
                slides.append({"blocks": [], "notes": []})
            begins = begins and not shown
            slides[-1]["blocks" if shown else "notes"].append((kind, text))
    return slides


def deck(book: dict, name: str) -> str:
    """One notebook -> the whole HTML file."""
    from sphinxcontrib import katex

    sections = []
    for slide in slides_of(book["cells"]):
        notes = "".join(t for _, t in slide["notes"])
        body = "".join(t for _, t in slide["blocks"])
        sections.append(f"<section><div class='fit'>{body}</div><aside>{notes}</aside></section>")
    script = next(Path(katex.__file__).parent.glob("katex.min.js")).read_text(encoding="utf-8")
    page = (HERE / "slides.html").read_text(encoding="utf-8")
    filled = {
        "@TITLE@": html.escape(name),
        "@KATEX@": script.replace("</script", "<\\/script"),
        "@MATHML@": (HERE / "static" / "mathml.js").read_text(encoding="utf-8"),
        "@SLIDES@": "\n".join(sections),
    }
    for mark, value in filled.items():
        page = page.replace(mark, value)
    return page


def make(books: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in books:
        text = deck(json.loads(path.read_text(encoding="utf-8")), path.stem)
        for other in books:  # decks stand beside each other as notebooks do
            text = text.replace(f'href="{other.name}', f'href="{other.stem}.html')
        (folder / f"{path.stem}.html").write_text(text, encoding="utf-8")


def main(folder: Path) -> int:
    books = sorted((ROOT / "notebooks").glob("*.ipynb"))
    make(books, folder)
    print(f"{len(books)} decks in {folder}. Arrow keys turn pages, n shows notes, f fills the screen.")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT / "build" / "slides"))
