"""Check the notebooks: anatomy, sizes, language, order, and that all is in step.

    python tools/check_notebooks.py                   everything, as CI does
    python tools/check_notebooks.py nbs/03_eql.ipynb  only the rules of one page

A rule of one page is a function `(path, nb) -> list[str]`; it stands in RULES. A rule
of the whole tree takes the project's folder; it stands in TREE_RULES.
"""

import ast
import difflib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import readme
from book import (
    ROOT,
    cleaned,
    directives,
    dumps,
    imported_modules,
    is_export,
    module_of,
    notebooks,
    read,
    tree,
)

CLOSING = ["What the paper leaves open", "Summary", "Try it"]
CODE, CODE_CLASS, MEDIAN = 25, 40, 6
WORDS, WORDS_FIRST, CELLS, BYTES, NEAR = 100, 80, 60, 500_000, 6

ROLE = re.compile(r"\{[a-zA-Z][\w:.+-]*\}`")
DIRECTIVE = re.compile(r"^\s*(```+|~~~+|:::+)\s*\{|^:::|^\([\w-]+\)=\s*$", re.MULTILINE)
HTML = re.compile(r"</?[a-zA-Z][\w-]*(\s[^<>]*)?/?>|<!--")
CODE_SPAN = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
MATH = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL)
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
MACHINE = re.compile(r"(?<![\w.])/(work|tmp|home|root|Users|opt|mnt|content)/")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")


# Reading a page


def kind(path: Path, nb: dict) -> str:
    """What a page is: chapter (it exports), essay, result, howto or index."""
    if path.parent.name in ("results", "howto"):
        return path.parent.name
    if path.stem == "index":
        return "index"
    return "chapter" if module_of(nb) else "essay"


def cells(nb: dict, of: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and source of the code or markdown cells."""
    for number, cell in enumerate(nb["cells"], 1):
        if cell["cell_type"] == of:
            yield number, cell["source"]


def headings(nb: dict) -> list[tuple[int, str]]:
    """Cell number and text of the H2 headings, in order."""
    found = []
    for number, source in cells(nb, "markdown"):
        text = CODE_SPAN.sub(lambda m: m[0].replace("#", " "), source)
        found += [(number, h.strip()) for h in re.findall(r"^## (.+)$", text, re.M)]
    return found


def code_lines(source: str) -> int:
    """Lines of code in a cell; blanks, directives and docstrings do not count."""
    rows = source.split("\n")
    skip = {i for i, row in enumerate(rows, 1) if not row.strip() or row[:2] == "#|"}
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                skip |= set(range(first.lineno, first.end_lineno + 1))
    return len(rows) - len(skip)


def words(source: str) -> int:
    """Words of a markdown cell, headings aside; a formula counts as one."""
    prose = MATH.sub("formula", re.sub(r"^#+ .*$", "", source, flags=re.MULTILINE))
    return sum(any(c.isalnum() for c in word) for word in prose.split())


def text_outputs(cell: dict) -> str:
    """All text that a code cell printed or showed."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append("".join(output.get("text", "")))
        data = output.get("data", {})
        parts += ["".join(v) for mime, v in data.items() if mime.startswith("text/")]
    return "\n".join(parts)


def public_names(source: str) -> list[str]:
    """The names that an exported cell adds to its module's `__all__`."""
    if "exporti" in directives(source):
        return []
    names = []
    for node in tree(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target)]
            names += [
                n.id
                for n in leaves
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
    return [name for name in names if not name.startswith("_")]


# Rules of one page


def check_opening(path: Path, nb: dict) -> list[str]:
    """Title and one `>` line; then, in a chapter, the module; then Where we are."""
    first = nb["cells"][0]
    rows = first["source"].split("\n")
    found = []
    if first["cell_type"] != "markdown" or not re.match(r"# \S", rows[0]):
        found.append("cell 1: must be markdown and begin with `# Title`")
    if sum(row.startswith("> ") for row in rows) != 1:
        found.append("cell 1: needs one `> sentence` line")
    if kind(path, nb) == "chapter":
        second = nb["cells"][1]["source"].strip()
        if not re.fullmatch(r"#\| default_exp \w+", second):
            found.append("cell 2: must hold `#| default_exp module` alone")
        third = nb["cells"][2]["source"]
        if not third.startswith("## Where we are"):
            found.append("cell 3: must begin with `## Where we are`")
    for number, source in cells(nb, "markdown"):
        if source.startswith("## Where we are"):
            if (count := words(source)) > WORDS_FIRST:
                found.append(f"cell {number}: {count} words, at most {WORDS_FIRST}")
    return found


def check_sections(path: Path, nb: dict) -> list[str]:
    """A chapter has 3 to 6 sections, then the closing three, in order."""
    if kind(path, nb) != "chapter":
        return []
    titles = [title for _, title in headings(nb)]
    found = []
    if titles[-3:] != CLOSING:
        found.append(f"must close with {CLOSING}, closes with {titles[-3:]}")
    middle = [t for t in titles if t not in CLOSING and t != "Where we are"]
    if not 3 <= len(middle) <= 6:
        found.append(f"{len(middle)} sections, must have 3 to 6")
    for number, source in cells(nb, "markdown"):
        if source.startswith("## Summary"):
            bullets = len(re.findall(r"^[-*] ", source, re.MULTILINE))
            if bullets != 3:
                found.append(f"cell {number}: {bullets} bullets, must be 3")
    return found


def check_imports(path: Path, nb: dict) -> list[str]:
    """Imports stand alone, before the first section, without a star."""
    found = []
    sections = [n for n, title in headings(nb) if title != "Where we are"]
    opening = sections[0] if sections and kind(path, nb) == "chapter" else CELLS
    for number, source in cells(nb, "code"):
        body = tree(source).body
        imports = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        if imports and len(imports) < len(body):
            found.append(f"cell {number}: imports must stand alone in their cell")
        if imports and number > opening:
            found.append(f"cell {number}: imports must stand before the sections")
        for node in imports:
            if any(alias.name == "*" for alias in node.names):
                found.append(f"cell {number}: star import")
    hidden = [n for n, source in cells(nb, "code") if "hide" in directives(source)]
    if len(hidden) > 1:
        found.append(f"cell {hidden[1]}: a second hidden cell")
    return found


def check_sizes(path: Path, nb: dict) -> list[str]:
    """Short cells, short pages."""
    found, sizes = [], []
    for number, source in cells(nb, "code"):
        body = tree(source).body
        one_class = len(body) == 1 and isinstance(body[0], ast.ClassDef)
        most, size = CODE_CLASS if one_class else CODE, code_lines(source)
        if size > most:
            found.append(f"cell {number}: {size} lines of code, at most {most}")
        if size:
            sizes.append(size)
    if sizes and statistics.median(sizes) > MEDIAN:
        median = statistics.median(sizes)
        found.append(f"median of {median} lines a code cell, at most {MEDIAN}")
    for number, source in cells(nb, "markdown"):
        if (count := words(source)) > WORDS:
            found.append(f"cell {number}: {count} words, at most {WORDS}")
    if len(nb["cells"]) > CELLS:
        found.append(f"{len(nb['cells'])} cells, at most {CELLS}")
    if (size := len(dumps(nb).encode())) > BYTES:
        found.append(f"{size:,} bytes, at most {BYTES:,}")
    return found


def check_markdown(path: Path, nb: dict) -> list[str]:
    """Plain markdown: no MyST, no HTML, no decoration."""
    found = []
    for number, source in cells(nb, "markdown"):
        if ROLE.search(source) or DIRECTIVE.search(source):
            found.append(f"cell {number}: MyST role, directive or label")
        prose = MATH.sub("", CODE_SPAN.sub("", source))
        if match := HTML.search(prose):
            found.append(f"cell {number}: HTML {match[0]}")
        if match := EMOJI.search(prose):
            found.append(f"cell {number}: decoration {match[0]}")
    return found


def check_outputs(path: Path, nb: dict) -> list[str]:
    """No errors, no stderr, no addresses; no path of one machine anywhere."""
    found = []
    for number, cell in enumerate(nb["cells"], 1):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: error or stderr output")
        text = text_outputs(cell)
        if match := ADDRESS.search(text):
            found.append(f"cell {number}: address {match[0]} in the output")
        if match := MACHINE.search(cell["source"] + "\n" + text):
            found.append(f"cell {number}: path of one machine, {match[0]}…")
    return found


def check_figures(path: Path, nb: dict) -> list[str]:
    """One figure a cell, with label, caption of two sentences and alt text."""
    found = []
    for number, cell in enumerate(nb["cells"], 1):
        datas = [output.get("data", {}) for output in cell.get("outputs", [])]
        count = sum(mime.startswith("image/") for data in datas for mime in data)
        if not count:
            continue
        given = directives(cell["source"])
        if count > 1:
            found.append(f"cell {number}: {count} figures, at most one")
        if not given.get("label", "").startswith("fig-"):
            found.append(f"cell {number}: figure without `#| label: fig-…`")
        if len(re.findall(r"[.?!](?=\s|$)", given.get("fig-cap", ""))) < 2:
            found.append(f"cell {number}: figure needs a caption of two sentences")
        if not given.get("fig-alt"):
            found.append(f"cell {number}: figure without alt text")
    return found


def check_asserted(path: Path, nb: dict) -> list[str]:
    """Every public name stands in a cell with an assertion soon after it is defined."""
    asserted: dict[int, set[str]] = {}
    for number, source in cells(nb, "code"):
        nodes = list(ast.walk(tree(source)))
        if not is_export(source) and any(isinstance(n, ast.Assert) for n in nodes):
            asserted[number] = {getattr(n, "id", getattr(n, "attr", "")) for n in nodes}
    found = []
    for number, source in cells(nb, "code"):
        near = [asserted.get(number + step, set()) for step in range(1, NEAR + 1)]
        for name in public_names(source) if is_export(source) else []:
            if name not in set().union(*near):
                found.append(
                    f"cell {number}: {name} is not asserted within {NEAR} cells"
                )
    return found


def check_clean(path: Path, nb: dict) -> list[str]:
    """The file is what `nbdev_clean` and `make notebooks` would leave."""
    if not path.exists() or dumps(cleaned(nb)) == path.read_text(encoding="utf-8"):
        return []
    return ["not clean; `make notebooks`"]


RULES = [
    check_opening,
    check_sections,
    check_imports,
    check_sizes,
    check_markdown,
    check_outputs,
    check_figures,
    check_asserted,
    check_clean,
]


def check_page(path: Path, nb: dict) -> list[str]:
    """All rules of one page; a broken cell is reported, not raised."""
    for number, source in cells(nb, "code"):
        try:
            tree(source)
        except SyntaxError as error:
            return [f"cell {number}: {error.msg}"]
    return [text for rule in RULES for text in rule(path, nb)]


# Rules of the whole tree


def check_order(root: Path = ROOT) -> list[str]:
    """A chapter imports only modules of chapters that come before it by file name."""
    pages = {path: read(path) for path in notebooks(root)}
    chapter_of = {module_of(nb): path.stem for path, nb in pages.items()}
    found = []
    for path, nb in pages.items():
        here = path.stem
        used = [
            (n, imported_modules(s, root / "eql_repro")) for n, s in cells(nb, "code")
        ]
        for number, modules in used:
            for module in sorted(modules):
                where = f"{path.relative_to(root)}: cell {number}: imports {module}"
                if module not in chapter_of:
                    found.append(f"{where}, which no chapter exports")
                elif here[:2].isdigit() and chapter_of[module] >= here:
                    found.append(f"{where} of chapter {chapter_of[module]}")
    return found


def export(root: Path) -> None:
    """Write the modules of a project, as its author would."""
    command = [Path(sys.executable).parent / "nbdev_export"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)


def check_in_step(root: Path = ROOT) -> list[str]:
    """`nbdev_export` into an empty folder gives the very modules that stand here."""
    with tempfile.TemporaryDirectory() as folder:
        copy, package = Path(folder), root / "eql_repro"
        shutil.copy(root / "settings.ini", copy)
        for path in notebooks(root):
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        (copy / "eql_repro").mkdir()
        shutil.copy(package / "__init__.py", copy / "eql_repro")
        export(copy)
        return _differences(package, copy / "eql_repro")


def _differences(here: Path, fresh: Path) -> list[str]:
    names = {p.relative_to(f) for f in (here, fresh) for p in f.rglob("*.py")}
    found = []
    for name in sorted(names):
        if not (fresh / name).exists():
            found.append(f"eql_repro/{name}: stale, no notebook exports it")
        elif not (here / name).exists():
            found.append(f"eql_repro/{name}: missing; `nbdev_export`")
        elif (here / name).read_text("utf-8") != (fresh / name).read_text("utf-8"):
            old = (here / name).read_text("utf-8").splitlines()
            new = (fresh / name).read_text("utf-8").splitlines()
            rows = list(difflib.unified_diff(old, new, lineterm="", n=0))[3:4]
            found.append(f"eql_repro/{name}: not in step, {rows}; `nbdev_export`")
    return found


def check_format(root: Path = ROOT) -> list[str]:
    """`ruff format` and `ruff check` have nothing to say."""
    ruff = Path(sys.executable).parent / "ruff"
    targets = ["docs", "nbs", "tests", "tools", "setup.py"]
    found = []
    for command in (["format", "--check"], ["check", "--output-format", "concise"]):
        done = subprocess.run(
            [ruff, *command, *targets], cwd=root, capture_output=True, text=True
        )
        if done.returncode:
            found += (done.stdout + done.stderr).strip().splitlines()
    return found


TREE_RULES = [check_order, check_in_step, readme.in_step, check_format]


def main() -> int:
    """Print every finding; return 1 if there is one."""
    chosen = [Path(arg).resolve() for arg in sys.argv[1:]]
    found = []
    for path in chosen or notebooks():
        name = path.relative_to(ROOT)
        found += [f"{name}: {text}" for text in check_page(path, read(path))]
    if not chosen:
        found += [text for rule in TREE_RULES for text in rule(ROOT)]
    print("\n".join(found) or f"{len(chosen or notebooks())} notebooks pass")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
