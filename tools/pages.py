"""The notebooks as pages of the site, and as Colab opens them.

The committed notebooks stay plain. Their copies lose directives and hidden cells, and
gain what a site has more: captions, alt texts, numbers of equations, links from names
to the reference and from papers to the bibliography.
"""

import ast
import copy
import posixpath
import re
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from book import DIRECTIVE, ROOT, directives, is_export, module_of, read

PARTS = {  # the first chapter of each part of the book
    0: "The idea and the losses",
    7: "Data",
    10: "Metrics and networks",
    13: "Recipes and training",
    15: "Records, figures, commands",
}
FOLDERS = {"results": "Results", "howto": "How to"}
FIRST = ("verdict",)  # results pages that stand before the paper's figures and tables
LATER = {  # chapters that are read after others than their names say
    "02_in_triton": "04_seql, in Triton",
    "02_kernels": "04_seql, kernels",
}
SPELLING = {
    "longtail": "long tail",
    "lambda": "λ",
    "gamma": "γ",
    "imagenet": "ImageNet",
    "triton": "Triton",
    **{word: word.upper() for word in ("eql", "seql", "lvis", "cifar", "cli")},
}
COLAB = """\
# On Colab: fetch the book, install it, go to this page's folder. Elsewhere: nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.getcwd().endswith("{repo}/{folder}"):
    clone = ["git", "clone", "-q", "--depth", "1", "--branch", "{branch}"]
    if not os.path.exists("{repo}"):
        subprocess.run([*clone, "{address}", "{repo}"], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "./{repo}[run]"]
    subprocess.run(install, check=True)
    os.chdir("{repo}/{folder}")
"""


# What there is


@dataclass(frozen=True)
class Page:
    """A notebook of the book. `path` is seen from nbs/, without its ending."""

    path: str
    nb: dict = field(repr=False)

    @property
    def stem(self) -> str:
        return posixpath.basename(self.path)

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.path)

    @cached_property
    def module(self) -> str | None:
        return module_of(self.nb)

    @cached_property
    def title(self) -> str:
        return self.nb["cells"][0]["source"].split("\n")[0].removeprefix("# ")

    @cached_property
    def sentence(self) -> str:
        """The `>` line below the title."""
        rows = self.nb["cells"][0]["source"].split("\n")
        return next(row[2:] for row in rows if row.startswith("> "))

    @property
    def key(self) -> str:
        """What its figures and equations are numbered by: 03, T7, or nothing."""
        if match := re.match(r"(\d\d)_", self.stem):
            return "" if self.folder else match[1]
        match = re.match(r"(fig|table)(\d+)", self.stem)
        return match[1][0].upper() + match[2] if match else ""

    @property
    def short(self) -> str:
        """The title in the sidebar, from the file's name; a how-to has its own."""
        if self.folder == "howto":
            return self.title
        words = [SPELLING.get(w, w) for w in self.stem.split("_")]
        if match := re.match(r"(fig|table)((?:\d+_)+\d*)", self.stem + "_"):
            numbers = match[2].strip("_").split("_")
            what = {"fig": "Figure", "table": "Table"}[match[1]]
            rest = " ".join(words[len(numbers) :])
            return f"{what}{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {rest}"
        if words[0].isdigit():
            return f"{words[0]} {_capital(' '.join(words[1:]))}"
        return _capital(" ".join(words))

    @property
    def order(self) -> tuple:
        """Chapters by name, but for `LATER`; results as in the paper.

        A figure stands before its table.
        """
        if match := re.match(r"(fig|table)(\d+)", self.stem):
            return (1, int(match[2]), match[1], self.stem)
        last = self.folder == "results" and not self.stem.startswith(FIRST)
        return (2 * last, 0, "", LATER.get(self.stem, self.stem))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Site:
    """All that the pages refer to."""

    root: Path
    pages: list[Page]
    settings: dict[str, str]
    papers: dict[str, dict[str, str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    homes: dict[int, str] = field(default_factory=dict)
    cited: dict[str, list[Page]] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def repository(self) -> str:
        return f"https://github.com/{self.settings['user']}/{self.settings['repo']}"

    def blob(self, path: str) -> str:
        """Where the code host shows a file or folder of the repository."""
        what = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.repository}/{what}/{self.settings['branch']}/{path}"

    def colab(self, page: Page) -> str:
        """Where Colab opens a page: its copy on the branch `colab`."""
        name = f"{self.settings['user']}/{self.settings['repo']}"
        base = "https://colab.research.google.com/github"
        return f"{base}/{name}/blob/colab/{page.path}.ipynb"

    def count(self, kind: str, page: Page) -> str:
        """The next number, 03.1; pages of one key share the count."""
        place = kind, page.key or page.path
        self.counts[place] = self.counts.get(place, 0) + 1
        return f"{page.key}.{self.counts[place]}".lstrip(".")

    def page(self, path: str) -> Page | None:
        """A page by its path."""
        return next((page for page in self.pages if page.path == path), None)


def settings(root: Path = ROOT) -> dict[str, str]:
    """What settings.ini says."""
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def load_site(root: Path = ROOT) -> Site:
    """All notebooks of a project, in the order of the book, and what they refer to."""
    nbs = root / "nbs"
    found = [p for p in nbs.rglob("*.ipynb") if not re.search(r"/[._]", p.as_posix())]
    paths = [p.relative_to(nbs).with_suffix("").as_posix() for p in found]
    pages = [Page(path, read(nbs / f"{path}.ipynb")) for path in paths]
    folders = ["", *FOLDERS]
    pages.sort(key=lambda p: (folders.index(p.folder), p.order))
    site = Site(root, pages, settings(root))
    site.papers.update(read_papers(root / "docs" / "references.bib"))
    for page in pages:
        for name in public_names(root, page.module) if page.module else []:
            site.names[f"{page.module}.{name}"] = f"eql_repro.{page.module}.{name}"
    return site


def public_names(root: Path, module: str) -> list[str]:
    """The `__all__` of a module, read without importing it."""
    text = (root / "eql_repro" / f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def read_papers(path: Path) -> dict[str, dict[str, str]]:
    """A .bib file with one field a line, as {key: {field: value}}."""
    papers: dict[str, dict[str, str]] = {}
    for row in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"@\w+\{(\w+),", row):
            papers[match[1]] = {}
        elif match := re.match(r"\s+(\w+) = \{(.*)\},?$", row):
            papers[list(papers)[-1]][match[1]] = match[2]
    return papers


# Prose

TOKEN = re.compile(
    r"(?P<fence>^```.*?^```)|(?P<display>^\$\$.*?\$\$)|(?P<heading>^#+ .*?$)"
    r"|(?P<span>`[^`]+`)|(?P<math>\$[^$]+\$)|(?P<link>\[[^\]]*\]\((?P<to>[^)\s]+)\))",
    re.DOTALL | re.MULTILINE,
)
EQUATION = re.compile(r"\bEq\.\s(\d+(?:(?:, |-| to )\d+)*)")
CITATION = re.compile(
    r"\b([A-Z]\w+) et al\.(?:,?\s+(?:[A-Z]\w+\s+)?(?:((?:19|20)\d\d)\b|\((\d{4})\)))?"
)


def prose(text: str, page: Page, site: Site, seen: set[str]) -> str:
    """Markdown with its links, names, papers and equations linked.

    Code, formulas and headings stay; `seen` holds the papers linked so far.
    """
    parts, at = [], 0
    for match in TOKEN.finditer(text):
        parts.append(_plain(text[at : match.start()], page, site, seen))
        kind, token = match.lastgroup, match[0]
        if kind == "to" or kind == "link":
            parts.append(_link(match, page, site))
        elif kind == "display":
            parts.append(_display(token, text[: match.start()], page, site))
        elif kind == "span":
            parts.append(_name(token, page, site))
        else:
            parts.append(token)
        at = match.end()
    return "".join([*parts, _plain(text[at:], page, site, seen)])


def _plain(text: str, page: Page, site: Site, seen: set[str]) -> str:
    text = CITATION.sub(lambda m: _cite(m, page, site, seen), text)
    for key, paper in site.papers.items():
        if key in seen or not (names := paper.get("names")):
            continue
        pattern = rf"(?<![\w[-])(?:{names.replace(', ', '|')})(?![\w-])"
        text, found = re.subn(pattern, rf"[\g<0>](#paper-{key})", text, count=1)
        if found:
            _note(key, page, site, seen)
    return EQUATION.sub(lambda m: _equation(m, site), text)


def _cite(match: re.Match, page: Page, site: Site, seen: set[str]) -> str:
    author, year = match[1], match[2] or match[3]
    for key, paper in site.papers.items():
        first = paper["author"].split(" and ")[0].split()[-1]
        if first == author and (not year or paper["year"] == year):
            _note(key, page, site, seen)
            return _paper(match[0], key)
    raise ValueError(f"{page.path}: docs/references.bib lacks {match[0]!r}")


def _paper(text: str, key: str) -> str:
    return f"[{text}](#paper-{key})"


def _note(key: str, page: Page, site: Site, seen: set[str]) -> None:
    seen.add(key)
    if page.folder == "api":
        return
    pages = site.cited.setdefault(key, [])
    if page not in pages:
        pages.append(page)


def _equation(match: re.Match, site: Site) -> str:
    number = numbers_of(match[1])[0]
    text = match[0].replace("\n", " ")
    return f"[{text}](#eq-{number})" if number in site.homes else match[0]


def numbers_of(text: str) -> list[int]:
    """The numbers that "6-7", "3, 4" or "9 to 11" stand for."""
    found = [int(n) for n in re.findall(r"\d+", text)]
    return found if "," in text else [*range(found[0], found[-1] + 1)]


def _link(match: re.Match, page: Page, site: Site) -> str:
    """A link to a page stays; one to another file leads to the code host."""
    to = match["to"]
    if re.match(r"[a-z]+:|#|/", to):
        return match[0]
    path, _, anchor = to.partition("#")
    full = posixpath.normpath(posixpath.join("nbs", page.folder, path))
    if full.startswith("nbs/") and site.page(full[4:].removesuffix(".ipynb")):
        return match[0]
    if not (site.root / full).exists():
        raise ValueError(f"{page.path}: link to {to}, which is not there")
    return match[0].replace(
        f"({to})", f"({site.blob(full)}{'#' * bool(anchor)}{anchor})"
    )


def _name(token: str, page: Page, site: Site) -> str:
    """A code span that names a page or something public, as a link."""
    text = token[1:-1]
    if other := next((p for p in site.pages if p.stem == text != "index"), None):
        if other is not page:
            to = posixpath.relpath(f"{other.path}.ipynb", page.folder or ".")
            return f"[{token}]({to})"
    if full := public(text, page.module, site):
        return f"{{py:obj}}`{text} <{full}>`"
    return token


def public(text: str, module: str | None, site: Site) -> str | None:
    """The full name of something public: of this module, or of one that alone has it.

    A plain word such as `step` is only meant where its own module is.
    """
    if f"{module}.{text}" in site.names:
        return site.names[f"{module}.{text}"]
    found = [full for name, full in site.names.items() if name.split(".")[1] == text]
    telling = "_" in text or text[:1].isupper()
    return found[0] if telling and len(found) == 1 else None


def _display(token: str, before: str, page: Page, site: Site) -> str:
    """A displayed formula with a label; the paper's number where the text gives it."""
    labels = [label for label in site.numbers if label.startswith(f"eq-{page.stem}-")]
    label = f"eq-{page.stem}-{len(labels) + 1}"
    targets = ""
    if numbers := paper_equation(before):
        known = site.homes.setdefault
        homes = [n for n in numbers if known(n, label) == label]
        targets = "".join(f"(eq-{n})=\n" for n in homes)
        ends = dict.fromkeys([numbers[0], numbers[-1]])
        site.numbers[label] = "Eq. " + "–".join(str(n) for n in ends)
    else:
        site.numbers[label] = site.count("equation", page)
    return f"{targets}{token} ({label})"


def paper_equation(before: str) -> list[int]:
    """The paper's numbers of a formula, if the text before it says so: "(Eq. 6-7)"."""
    paragraph = before.rstrip().split("\n\n")[-1]
    if match := EQUATION.match(paragraph):
        return numbers_of(match[1])
    found = [m for m in EQUATION.finditer(paragraph) if paragraph[m.start() - 1] == "("]
    return numbers_of(found[-1][1]) if found else []


# Pages


def build_copy(page: Page, site: Site) -> dict:
    """A notebook as Sphinx reads it."""
    nb, seen = copy.deepcopy(page.nb), set()
    cells = []
    for number, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "markdown":
            cell["source"] = prose(cell["source"], page, site, seen)
            if number == 0:
                rows = cell["source"].split("\n")
                below = (
                    next(i for i, row in enumerate(rows) if row.startswith("> ")) + 1
                )
                rows[below:below] = ["", *page_links(page, site).split("\n"), ""]
                cell["source"] = "\n".join(rows)
            cells.append(cell)
            continue
        for output in cell["outputs"]:
            if "text/markdown" in (data := output.get("data", {})):
                text = "".join(data["text/markdown"])
                data["text/markdown"] = prose(text, page, site, seen)
        cells += code_cell(cell, page, site, seen)
    return {**nb, "cells": cells}


def page_links(page: Page, site: Site) -> str:
    """The line below a page's title: Colab, source, reference."""
    links = [
        f"[Open in Colab]({site.colab(page)})",
        f"[View source]({site.blob(f'nbs/{page.path}.ipynb')})",
    ]
    if page.module:
        links.append(f"[Reference of `eql_repro.{page.module}`](api/{page.module}.md)")
    return f"```{{container}} page-links\n{' · '.join(links)}\n```"


def code_cell(cell: dict, page: Page, site: Site, seen: set) -> list[dict]:
    """A code cell without directives, its figure described; nothing if it is hidden."""
    given = directives(cell["source"])
    code = shown(cell["source"])
    if "hide" in given or "default_exp" in given or not code:
        return []
    tags = ["remove-input"] if given.get("echo") == "false" else []
    tags += ["export"] if is_export(cell["source"]) else []
    cell |= {"source": code, "metadata": {"tags": tags}, "execution_count": None}
    before, after = [], []
    if "export" in tags:
        before = [markdown(f"(cell-{cell['id']})=", f"at-{cell['id']}")]
    if caption := given.get("fig-cap"):
        number = site.count("figure", page)
        text = f"**Figure {number}.** {prose(caption, page, site, seen)}"
        name = f"{given['label']}-{page.stem}"
        pictures = [o for o in cell["outputs"] if _is_picture(o)]
        if pictures:
            cell["metadata"]["mystnb"] = {
                "figure": {"caption": text, "name": name, "align": "center"},
                "image": {"alt": given["fig-alt"]},
            }
        else:
            block = f"({name})=\n```{{container}} caption-text\n{text}\n```"
            after = [markdown(block, f"to-{cell['id']}")]
    return [*before, cell, *after]


def shown(source: str) -> str:
    """The code of a cell without its directives."""
    return DIRECTIVE.sub("", source).strip("\n")


def _is_picture(output: dict) -> bool:
    return any(mime.startswith("image/") for mime in output.get("data", {}))


def markdown(source: str, name: str) -> dict:
    """A new markdown cell."""
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}


def colab_copy(page: Page, site: Site) -> dict:
    """A notebook as Colab opens it: its first code cell fetches the repository."""
    nb = copy.deepcopy(page.nb)
    given = {
        "repo": site.settings["repo"],
        "branch": site.settings["branch"],
        "folder": posixpath.join("nbs", page.folder).rstrip("/"),
        "address": site.repository,
    }
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "colab",
        "metadata": {},
        "outputs": [],
        "source": COLAB.format(**given).rstrip("\n"),
    }
    nb["cells"].insert(1, cell)
    return nb


# The first page


def landing(page: Page, site: Site) -> dict:
    """The index as the site's first page: picture and doors before the rest."""
    nb = build_copy(page, site)
    cells = [prune_imports(nb, cell) for cell in nb["cells"]]
    title, *rest = [cell for cell in cells if cell["source"]]
    doors = [c for c in rest if c["source"].startswith("## Three doors")]
    what = [c for c in rest if c["source"].startswith("## What it is")]
    for cell in what:
        cell["source"] = cell["source"].partition("\n")[2]
    clone = f"```\ngit clone {site.repository}\ncd {site.settings['repo']}\n"
    for cell in rest:  # the first commands begin with a clone
        cell["source"] = cell["source"].replace("```\nmake run", f"{clone}make run")
    rest = [cell for cell in rest if cell not in doors + what]
    pictures = [PICTURE.replace("MODE", mode) for mode in ("light", "dark")]
    picture = markdown("\n".join(pictures), "picture")
    cards = [markdown(door_cards(cell["source"]), "doors") for cell in doors]
    toc = markdown(contents(site), "contents")
    return {**nb, "cells": [title, *what, picture, *cards, *place_imports(rest), toc]}


PICTURE = """\
```{figure} glance-MODE.svg
:alt: Two grids with a row for the objects of each class and one for background, and a \
column for each class. Under the sigmoid loss every cell off the diagonal is orange. \
Under the equalization loss the columns of the rare classes are empty but for the \
diagonal and the background row, and the bars below them are higher.
:class: only-MODE
:figclass: only-MODE glance

Rows are the objects of a class, columns the scores that they move: orange pushes \
down, blue pulls up. The equalization loss takes the rare classes out of all other \
classes' objects; background still holds them down. Drawn from the gradients of the \
package's losses at the start of training, ten classes with 1,000 to 10 regions.
```
"""


def door_cards(source: str) -> str:
    """The list of doors as cards side by side."""
    doors = re.findall(r"^- \*\*(.+?)\*\*: (.+)$", source, re.MULTILINE)
    cards = [
        f"````{{grid-item-card}} {name}\n{_capital(text)}\n````" for name, text in doors
    ]
    return "\n".join(["`````{grid} 1 1 3 3", ":gutter: 3", *cards, "`````"])


def prune_imports(nb: dict, cell: dict) -> dict:
    """An import cell with no more than the cells that are shown use."""
    if cell["cell_type"] != "code" or not _only_imports(cell["source"]):
        return cell
    others = [c for c in nb["cells"] if c["cell_type"] == "code" and c is not cell]
    open_cells = [c for c in others if "remove-input" not in c["metadata"]["tags"]]
    used = {
        node.id
        for c in open_cells
        for node in ast.walk(ast.parse(c["source"]))
        if isinstance(node, ast.Name)
    }
    kept = []
    for node in ast.parse(cell["source"]).body:
        node.names = [a for a in node.names if (a.asname or a.name) in used]
        kept += [_import_text(node)] if node.names else []
    return {**cell, "source": "\n".join(kept)}


def _only_imports(source: str) -> bool:
    body = ast.parse(source).body
    return bool(body) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)


def _import_text(node: ast.stmt) -> str:
    text = ast.unparse(node)
    if len(text) <= 80:
        return text
    head, _, names = text.partition(" import ")
    rows = "".join(f"    {name},\n" for name in names.split(", "))
    return f"{head} import (\n{rows})"


def place_imports(cells: list[dict]) -> list[dict]:
    """The cells, each import cell moved to right before the code that follows it."""
    out, held = [], []
    for cell in cells:
        code = cell["cell_type"] == "code"
        if code and _only_imports(cell["source"]):
            held.append(cell)
            continue
        if code and held:
            imports = "\n".join(c["source"] for c in held)
            cell = {**cell, "source": f"{imports}\n\n{cell['source']}"}
            held = []
        out.append(cell)
    return out


def contents(site: Site) -> str:
    """The tables of contents: the parts of the book, results, how-tos, reference."""
    groups: dict[str, list[str]] = {}
    for page in site.pages:
        if page.stem == "index":
            continue
        part = FOLDERS.get(page.folder) or part_of(page)
        groups.setdefault(part, []).append(f"{page.short} <{page.path}>")
    groups["Reference"] = ["Reference <api/index>", "Bibliography <references>"]
    return "\n\n".join(toctree(rows, caption) for caption, rows in groups.items())


def toctree(rows: list[str], caption: str = "") -> str:
    """A hidden toctree."""
    head = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *head, "", *rows, "```"])


def part_of(page: Page) -> str:
    """The part of the book that a chapter belongs to, by its number."""
    number = int(page.stem[:2]) if page.stem[:2].isdigit() else 0
    return PARTS[max(first for first in PARTS if first <= number)]


def bibliography(site: Site) -> str:
    """The page of the papers, with the pages that name them."""
    rows = ["# Bibliography", ""]
    for key, paper in sorted(site.papers.items()):
        authors = paper["author"].replace(" and ", ", ")
        text = f"(paper-{key})=\n{authors}. *{paper['title']}*. {paper['venue']}"
        text += f", {paper['year']}." if paper["year"] not in paper["venue"] else "."
        if number := paper.get("arxiv"):
            text += f" [arXiv {number}](https://arxiv.org/abs/{number})."
        if pages := site.cited.get(key):
            links = [f"[{page.short}]({page.path}.ipynb)" for page in pages]
            more = f" and {len(links) - 8} more" if len(links) > 9 else ""
            text += f" Named in {', '.join(links[:8] if more else links)}{more}."
        rows += [text, ""]
    return "\n".join(rows)
