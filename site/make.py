"""Build the course as a static site from the committed notebooks, without running them: `make site`.

    python site/make.py [FOLDER]     default: build/site

Pages are those of this folder, INSTRUCTORS.md, SECURITY.md, the notebooks, and the map from papers to code, which is
read from the package. It ends with a look at every link: one that leads nowhere, or a script or style that would come
from a network, fails the build.
"""

import ast
import collections
import json
import re
import shutil
import sys
import tempfile
import urllib.parse
import zipfile
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EQUATION = re.compile(
    r"#\s*((?:[A-Z][\w-]*)(?: note)?(?: eq\.| Table| sec\.)[^\n]*|http\S*kl-approx\S*[^\n]*)"
)


def main(output: Path) -> int:
    from sphinx.cmd.build import main as sphinx

    source = ROOT / "build" / "site-source"
    shutil.rmtree(source, ignore_errors=True)
    (source / "notebooks").mkdir(parents=True)
    for page in [*HERE.glob("*.md"), ROOT / "INSTRUCTORS.md", ROOT / "SECURITY.md"]:
        shutil.copy(page, source / page.name.lower())
    books = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in books:
        shutil.copy(path, source / "notebooks" / path.name)
    names = "\n".join(f"notebooks/{p.stem}" for p in books)
    index = (source / "index.md").read_text(encoding="utf-8").replace("@NOTEBOOKS@", names)
    (source / "index.md").write_text(index, encoding="utf-8")
    (source / "map.md").write_text(paper_to_code(books), encoding="utf-8")
    student_edition(books, source / "downloads")
    shutil.rmtree(output, ignore_errors=True)
    if code := sphinx(["-q", "-b", "html", "-c", str(HERE), str(source), str(output)]):
        return code
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


def paper_to_code(books: list[Path]) -> str:
    """Equation -> function -> notebooks -> tests, read from the comments in the package."""
    used = collections.defaultdict(list)
    for path in books:
        code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
        for word in set(re.findall(r"\w+", code)):
            used[word].append(f"[{path.stem[:2]}](notebooks/{path.name})")
    tests = collections.defaultdict(list)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for word in set(re.findall(r"\w+", path.read_text(encoding="utf-8"))):
            tests[word].append(path.name)
    lines = [
        "# From paper to code\n",
        "Each equation that the package executes: where it stands, which notebooks use it, which tests hold it. The",
        "table is read from the code when the site is built.\n",
        "| equation | function | notebooks | tests |",
        "|---|---|---|---|",
    ]
    for path in sorted((ROOT / "rlhf_edu").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        spans = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        for number, line in enumerate(text.split("\n"), 1):
            if not (found := EQUATION.search(line)):
                continue
            around = [n for n in spans if n.lineno <= number <= n.end_lineno]
            if around:
                name = max(around, key=lambda n: n.lineno).name
                where = f"`{path.stem}.{name}` (line {number})"
                held = ", ".join(f"`{t}`" for t in tests[name][:4])
                lines.append(f"| {found.group(1).strip()} | {where} | {' '.join(used[name])} | {held} |")
    return "\n".join(lines) + "\n"


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
    return sorted(set(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT / "build" / "site"))
