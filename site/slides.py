"""A deck of slides for each notebook, one HTML file that needs no network: `make slides`.

    python site/slides.py [FOLDER]     default: build/slides

Only marked cells count (JupyterLab: Property Inspector, Slide Type): `slide` and `subslide` begin a slide (as any heading does),
`fragment` goes on with it, `notes` are for the speaker (key n), all others are left out. Of a text its headings, first paragraph,
predictions, formulas, lists, tables and boxes stand on the slide, and further paragraphs become notes. Of a code cell its
outputs, with the code itself where it has eight lines or less and shows no picture. Hints never do. Arrow keys, space or a
tap turn the page; printing gives one page a slide.
"""

import functools
import html
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHOWN = ("slide", "subslide", "fragment")
HEADINGS = ("h1", "h2", "h3")
SHORT = 8  # lines of code that are shown
ROOM = 100  # what one slide holds, in the units of `weight`
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
    """(kind, html) of what a cell shows: pictures, tables, short texts."""
    shown = []
    for output in cell.get("outputs", []):
        found = output.get("data", {})
        text = "".join(output.get("text", found.get("text/plain", "")))
        if "image/png" in found:
            data = "".join(found["image/png"]).replace("\n", "")
            shown.append(
                ("image", f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{data}'>")
            )
        elif "text/html" in found:
            shown.append(("output", f"<div class='out'>{''.join(found['text/html'])}</div>"))
        elif text.strip() and output.get("name") != "stderr":
            lines = text.rstrip().split("\n")
            kept = "\n".join(lines[:TEXT_LINES]) + "\n…" * (len(lines) > TEXT_LINES)
            shown.append(("output", f"<pre class='out'>{html.escape(kept)}</pre>"))
    return shown


def code_of(cell: dict) -> str:
    source = "".join(cell["source"]).replace("# NBVAL_CHECK_OUTPUT\n", "").strip()
    return f"<pre class='code'>{html.escape(source)}</pre>"


def mark_of(cell: dict) -> str | None:
    return cell["metadata"].get("slideshow", {}).get("slide_type")


def blocks_of(cell: dict) -> list[tuple[str, str, bool]]:
    """(kind, html, whether it stands on the slide or is only said) of each block."""
    if cell["cell_type"] == "code":
        code, shown = code_of(cell), outputs_of(cell)
        alone = any(kind == "image" for kind, _ in shown) or code.count("\n") >= SHORT
        return [(kind, text, True) for kind, text in ([] if alone else [("code", code)]) + shown]
    blocks, paragraphs = [], 0
    for kind, text in markdown_blocks("".join(cell["source"])):
        paragraphs = 0 if kind in HEADINGS else paragraphs + (kind == "paragraph")
        said = kind == "paragraph" and paragraphs > 1 and "<strong>Predict" not in text
        if kind != "hr":
            blocks.append((kind, text, not said))
    return blocks


def slides_of(cells: list[dict]) -> list[dict]:
    """The slides that the marks of a notebook's cells make; a heading inside a cell begins one too."""
    slides = []
    for cell in cells:
        mark = mark_of(cell)
        if mark in ("slide", "subslide"):
            slides.append({"blocks": [], "notes": []})
        if mark not in (*SHOWN, "notes") or not slides:
            continue
        for kind, text, shown in blocks_of(cell):
            shown = shown and mark != "notes"
            if shown and kind in HEADINGS and slides[-1]["blocks"]:
                slides.append({"blocks": [], "notes": []})
            slides[-1]["blocks" if shown else "notes"].append((kind, text))
    return slides


def weight(kind: str, text: str) -> float:
    """About how much of a slide a block takes; 100 is all of it."""
    if kind == "image":
        return 70
    if kind in ("table", "bullet_list", "ordered_list", "output") and "<pre" not in text:
        return 5 + 7 * max(text.count("<tr"), text.count("<li")) + len(text) / 200 * ("<tr" not in text)
    if "<pre" in text:
        return 5 + 4.5 * text.count("\n")
    return {"h1": 15, "h2": 12, "h3": 12, "math_block": 14}.get(kind, 5 + len(text) / 22)


def paged(decks: list[dict]) -> list[dict]:
    """The same, with what does not fit on slides of its own under the same heading."""
    pages = []
    for deck in decks:
        head = [b for b in deck["blocks"][:1] if b[0][:1] == "h"]
        page, full = {"blocks": [], "notes": deck["notes"]}, 0.0
        for block in deck["blocks"]:
            if full + weight(*block) > ROOM and len(page["blocks"]) > len(head):
                pages.append(page)
                page, full = {"blocks": list(head), "notes": []}, sum(weight(*b) for b in head)
            page["blocks"].append(block)
            full += weight(*block)
        pages.append(page)
    return pages


def deck(book: dict, name: str) -> str:
    """One notebook -> the whole HTML file."""
    from sphinxcontrib import katex

    sections = []
    for slide in paged(slides_of(book["cells"])):
        notes = "".join(t for _, t in slide["notes"])
        body = "".join(t for _, t in slide["blocks"])
        sections.append(f"<section><div class='fit'>{body}</div><aside>{notes}</aside></section>")
    script = next(Path(katex.__file__).parent.glob("katex.min.js")).read_text(encoding="utf-8")
    page = (HERE / "slides.html").read_text(encoding="utf-8")
    filled = {
        "@TITLE@": html.escape(name),
        "@KATEX@": script.replace("</script", "<\\/script"),
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
