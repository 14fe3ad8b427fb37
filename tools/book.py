"""Find, read and write the notebooks: what the other tools share."""

import ast
import copy
import json
import re
from pathlib import Path

from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*?)[ \t]*$", re.MULTILINE)
EXPORTS = ("export", "exports", "exporti")


def notebooks(root: Path = ROOT) -> list[Path]:
    """All notebooks of the book, those named _… or .… aside, chapters first."""
    found = (root / "nbs").rglob("*.ipynb")
    inside = [p for p in found if not _hidden(p.relative_to(root))]
    return sorted(inside, key=lambda p: (len(p.parts), p.as_posix()))


def _hidden(path: Path) -> bool:
    return any(part[0] in "._" for part in path.parts)


def read(path: Path) -> dict:
    """One notebook as a dict; every source is one string."""
    return loads(path.read_text(encoding="utf-8"))


def loads(text: str) -> dict:
    """The file text of a notebook as a dict; every source is one string."""
    nb = json.loads(text)
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def dumps(nb: dict) -> str:
    """The file text of a notebook, byte for byte as nbdev and Jupyter write it."""
    nb = copy.deepcopy(nb)
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = lines(output["text"])
            for mime, value in output.get("data", {}).items():
                if mime.startswith("text/") or mime == "image/svg+xml":
                    output["data"][mime] = lines(value)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def lines(text: str | list[str]) -> list[str]:
    """Text as the list of lines a notebook file holds."""
    return "".join(text).splitlines(keepends=True)


def cleaned(nb: dict) -> dict:
    """A copy as `nbdev_clean` leaves it: no counts, no metadata of the moment."""
    nb = copy.deepcopy(nb)
    clean_nb(nb, clean_ids=False)
    nb["metadata"] = {
        "kernelspec": {
            "display_name": "python3",
            "language": "python",
            "name": "python3",
        }
    }
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = {}
    return nb


def directives(source: str) -> dict[str, str]:
    """The `#| key: value` lines of a code cell; a bare `#| key` gives ""."""
    return dict(DIRECTIVE.findall(source))


def tree(source: str) -> ast.Module:
    """The syntax tree of a code cell, without its magics and shell lines."""
    kept = [
        "pass" if re.match(r"\s*[%!]", line) else line for line in source.split("\n")
    ]
    return ast.parse("\n".join(kept))


def is_export(source: str) -> bool:
    """Whether nbdev copies this cell to a module."""
    return any(key in directives(source) for key in EXPORTS)


def module_of(nb: dict) -> str | None:
    """The module a notebook exports to, None if it exports nothing."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and "default_exp" in directives(cell["source"]):
            return directives(cell["source"])["default_exp"]
    return None


def imported_modules(source: str | ast.AST, package: Path) -> set[str]:
    """The modules of eql_repro that some code imports, at any depth.

    A name taken from the package itself counts as the module that defines it.
    """
    top_level = _top_level_names(package / "__init__.py")
    found: set[str] = set()
    for node in ast.walk(tree(source) if isinstance(source, str) else source):
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {p[1] for p in parts if p[0] == "eql_repro" and len(p) > 1}
        elif isinstance(node, ast.ImportFrom):
            base = ("eql_repro." if node.level else "") + (node.module or "")
            parts = base.rstrip(".").split(".")
            if parts[0] != "eql_repro":
                continue
            names = [alias.name for alias in node.names]
            found |= {parts[1]} if len(parts) > 1 else _owners(names, top_level)
    return found


def _owners(names: list[str], top_level: dict[str, str]) -> set[str]:
    return {top_level.get(name, name) for name in names if not name.startswith("__")}


def _top_level_names(init: Path) -> dict[str, str]:
    if not init.exists():
        return {}
    nodes = ast.walk(ast.parse(init.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: (node.module or "").removeprefix("eql_repro.")
        for node in imports
        for alias in node.names
    }
