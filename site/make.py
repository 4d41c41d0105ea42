"""Build the course as a static site from the committed notebooks, without running them: `make site`.

    python site/make.py [FOLDER]     default: build/site

Pages are those of this folder, INSTRUCTORS.md, SECURITY.md, the notebooks with a deck of slides each, and the map from
papers to code (paper_to_code.py). It ends with a look at every link: one that leads nowhere, or a script or style that would come
from a network, fails the build.
"""

import itertools
import json
import re
import shutil
import sys
import tempfile
import urllib.parse
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import paper_to_code
import slides

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main(output: Path) -> int:
    from sphinx.cmd.build import main as sphinx

    source = ROOT / "build" / "site-source"
    shutil.rmtree(source, ignore_errors=True)
    (source / "notebooks").mkdir(parents=True)
    for page in [*HERE.glob("*.md"), ROOT / "INSTRUCTORS.md", ROOT / "SECURITY.md"]:
        shutil.copy(page, source / page.name.lower())
    books = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in books:
        text = path.read_text(encoding="utf-8").replace(
            '"# NBVAL_CHECK_OUTPUT\\n",', ""
        )  # for the tests alone
        (source / "notebooks" / path.name).write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "data" / "results" / "mini" / "frontier.png", source)
    names = "\n".join(f"notebooks/{p.stem}" for p in books)
    index = (source / "index.md").read_text(encoding="utf-8").replace("@NOTEBOOKS@", names)
    (source / "index.md").write_text(index, encoding="utf-8")
    (source / "map.md").write_text(paper_to_code.page(books), encoding="utf-8")
    instructors = (source / "instructors.md").read_text(encoding="utf-8")
    decks = " · ".join(f"<a href='slides/{p.stem}.html'>{p.stem[:2]}</a>" for p in books)
    more = f"## Minutes and slides\n\n{minutes(books)}\nSlides (`make slides` makes them alone): {decks}\n\n## A term\n"
    (source / "instructors.md").write_text(instructors.replace("## A term\n", more), encoding="utf-8")
    student_edition(books, source / "downloads")
    shutil.rmtree(output, ignore_errors=True)
    if code := sphinx(["-q", "-b", "html", "-c", str(HERE), str(source), str(output)]):
        return code
    for path in books:
        number_the_cells(output / "notebooks" / f"{path.stem}.html")
    slides.make(books, output / "slides")
    problems = broken(output)
    print(*problems, sep="\n")
    print(
        f"{len(list(output.rglob('*.html')))} pages, {len(problems)} broken links. Open {output / 'index.html'}"
    )
    return 1 if problems else 0


def student_edition(books: list[Path], folder: Path) -> None:
    """student.zip: the notebooks without solutions."""
    from rlhf_edu import editions

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(folder / "student.zip", "w") as archive:
        masters = Path(temporary) / "masters"
        masters.mkdir()
        for path in books:
            shutil.copy(path, masters)
        editions.make(masters, Path(temporary) / "dist")
        for path in sorted((Path(temporary) / "dist" / "student").glob("*.ipynb")):
            archive.write(path, f"rlhf_edu_student/{path.name}")


def minutes(books: list[Path]) -> str:
    """A table: what each notebook's card says of time, and its exercises with their minutes."""
    lines = ["| notebook | its card says | exercises | their minutes |", "|---|---|---|---|"]
    for path in books:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        title = re.search(r"^# (.+)$", text, re.MULTILINE).group(1)
        card = re.search(r"^\| \*\*Time\*\* \|(.+)\|$", text, re.MULTILINE)
        each = re.findall(r"^#+ Exercise \d\d\.\d+.*?(\d+) min", text, re.MULTILINE)
        said = card.group(1).strip() if card else ""
        lines.append(f"| [{title}](notebooks/{path.name}) | {said} | {len(each)} | {sum(map(int, each))} |")
    return "\n".join(lines) + "\n"


def number_the_cells(page: Path) -> int:
    """Give each code cell of a page the name that the map points at: code-1, code-2, ... Returns how many."""
    numbers = itertools.count(1)
    text = re.sub(
        r'<div class="cell(?=[ "])',
        lambda m: f'<div id="code-{next(numbers)}" {m.group()[5:]}',
        page.read_text("utf-8"),
    )
    page.write_text(text, encoding="utf-8")
    return next(numbers) - 1


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.loaded, self.names = [], [], set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("img", "script", "link", "iframe") and given.get("src" if tag != "link" else "href"):
            self.loaded.append(given["src" if tag != "link" else "href"])


def broken(output: Path) -> list[str]:
    """One line for each link into the site that leads nowhere, and for each thing that would be fetched from a network."""
    pages = {}
    for path in output.rglob("*.html"):
        pages[path] = Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    problems = []
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    problems.append(f"{path.relative_to(output)} loads {link}")
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = urllib.parse.unquote(parts.fragment)
            lost = not target.exists() or anchor and target in pages and anchor not in pages[target].names
            if lost and link != "#":
                problems.append(f"{path.relative_to(output)}: {link} leads nowhere")
    for path in output.rglob("*.css"):
        for link in re.findall(
            r"(?:url\(|@import )\s*['\"]?((?:https?:)?//[^'\")\s]+)", path.read_text(encoding="utf-8")
        ):
            problems.append(f"{path.relative_to(output)} loads {link}")
    return sorted(set(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT / "build" / "site"))
