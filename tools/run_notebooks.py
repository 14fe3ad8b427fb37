"""Execute notebooks, store their clean outputs, compare them with the stored ones.

python tools/run_notebooks.py                    execute all and compare
python tools/run_notebooks.py --write --changed  store; only what changed
python tools/run_notebooks.py --write nbs/03_eql.ipynb
"""

import argparse
import ast
import base64
import copy
import hashlib
import io
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
import numpy as np
from book import (
    ROOT,
    cleaned,
    directives,
    dumps,
    imported_modules,
    loads,
    notebooks,
    read,
    tree,
)
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

MEMORY = ROOT / ".executed.json"
DECISIVE = ("torch", "torchvision", "numpy", "matplotlib", "pandas")
READERS = {"records", "figures"}  # the modules that read records/ and paper/
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "COLUMNS": "80",
    "NO_COLOR": "1",
    "TERM": "dumb",
}


def execute(path: Path, timeout: int = 600) -> dict:
    """Run a notebook in its own folder; return it clean, with new outputs.

    The kernel sees one thread, no GPU and no EQL_DATA, so that every machine
    shows the same. A cell with `#| eval: false` is left alone.
    """
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if directives(cell.source).get("eval") == "false":
            cell.metadata["tags"] = ["skip-execution"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("EQL_")}
    with tempfile.TemporaryDirectory() as sockets:
        place = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        NotebookClient(
            nb,
            timeout=timeout,
            kernel_name="python3",
            config=Config(KernelManager=place),
            resources={"metadata": {"path": str(path.parent)}},
        ).execute(env={**env, **ENVIRONMENT})
    return cleaned(loads(nbformat.writes(nb)))


def compare(old: dict, new: dict) -> list[str]:
    """What differs between two executions, a line each with its cell number.

    Text and tables must agree exactly, figures coarsely.
    """
    if len(old["cells"]) != len(new["cells"]):
        return [f"{len(old['cells'])} cells became {len(new['cells'])}"]
    found = []
    pairs = zip(old["cells"], new["cells"], strict=True)
    for number, (before, after) in enumerate(pairs, 1):
        found += [f"cell {number}: {text}" for text in _compare_cell(before, after)]
    return found


def _compare_cell(before: dict, after: dict) -> list[str]:
    old, new = _flat(before), _flat(after)
    kinds = [mime for mime, _ in old], [mime for mime, _ in new]
    if kinds[0] != kinds[1]:
        return [f"stored outputs are {kinds[0]}, new ones {kinds[1]}"]
    found = []
    for (mime, one), (_, two) in zip(old, new, strict=True):
        if mime.startswith("image/png"):
            found += _compare_figures(one, two)
        elif one != two:
            found.append(f"{mime} differs: {_first_difference(one, two)}")
    return found


def _flat(cell: dict) -> list[tuple[str, str]]:
    """All outputs of a cell as (kind, content); streams joined by name."""
    flat: list[tuple[str, str]] = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            flat.append(("error", output["ename"]))
        elif output["output_type"] == "stream":
            text = "".join(output["text"])
            if flat and flat[-1][0] == output["name"]:
                text = flat.pop()[1] + text
            flat.append((output["name"], text))
        else:
            flat += [(k, "".join(v)) for k, v in sorted(output["data"].items())]
    return flat


def _first_difference(one: str, two: str) -> str:
    old, new = one.split("\n"), two.split("\n")
    length = max(len(old), len(new))
    old += ["(nothing)"] * (length - len(old))
    new += ["(nothing)"] * (length - len(new))
    at = next(i for i in range(length) if old[i] != new[i])
    return f"stored {old[at][:120]!r}, new {new[at][:120]!r}"


def _compare_figures(one: str, two: str) -> list[str]:
    old, new = _thumbnail(one), _thumbnail(two)
    sizes = _size(one), _size(two)
    if max(abs(a / b - 1) for a, b in zip(*sizes, strict=True)) > 0.1:
        return [f"figure had size {sizes[0]}, has {sizes[1]}"]
    ink = np.abs(old - np.median(old, axis=(0, 1))).mean()
    moved = np.abs(old - new).mean() / max(ink, 1e-3)
    return [f"figure differs: {moved:.0%} of its ink moved"] if moved > 0.2 else []


def _open(png: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _size(png: str) -> tuple[int, int]:
    return _open(png).size


def _thumbnail(png: str) -> np.ndarray:
    small = _open(png).resize((48, 36), Image.Resampling.BOX)
    return np.asarray(small, dtype=float) / 255


def pins(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """The versions named in a constraints file."""
    rows = path.read_text(encoding="utf-8").splitlines()
    pairs = [row.split("#")[0].split(";")[0].partition("==") for row in rows]
    return {name.strip(): number.strip() for name, _, number in pairs if number}


def other_versions() -> list[str]:
    """The libraries that decide what outputs look like and are not the tested ones."""
    tested, found = pins(), []
    for name in DECISIVE:
        try:
            here = version(name).split("+")[0]
        except PackageNotFoundError:
            here = "none"
        if here != tested[name]:
            found.append(f"{name} {here} (tested: {tested[name]})")
    return found


def fingerprint(path: Path, root: Path = ROOT) -> str:
    """A hash of all that a notebook's outputs depend on inside the project."""
    sources = [c["source"] for c in read(path)["cells"] if c["cell_type"] == "code"]
    package, modules, files = root / "eql_repro", set(), []
    todo = set().union(*(imported_modules(tree(s), package) for s in sources))
    while todo:
        name = todo.pop()
        file = package / f"{name}.py"
        if name in modules or not file.exists():
            continue
        modules.add(name)
        files.append(file)
        todo |= imported_modules(ast.parse(file.read_text("utf-8")), package)
    if modules & READERS:
        files += [*root.glob("records/*.*"), *root.glob("paper/*.csv")]
    parts = ["\n".join(sources), (root / "constraints.txt").read_text("utf-8")]
    parts += [file.name + file.read_text("utf-8") for file in sorted(files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def main() -> int:
    """Execute, then store or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="default: all")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    parser.add_argument("--changed", action="store_true", help="skip what stands")
    args = parser.parse_args()
    memory = json.loads(MEMORY.read_text()) if MEMORY.exists() else {}
    failed = False
    for path in [p.resolve() for p in args.paths] or notebooks():
        name = path.relative_to(ROOT).as_posix()
        if args.changed and memory.get(name) == fingerprint(path):
            continue
        print(f"executing {name}", flush=True)
        old, new = copy.deepcopy(read(path)), execute(path)
        if not args.write:
            problems = compare(old, new)
            print("".join(f"  {text}\n" for text in problems), end="")
            failed |= bool(problems)
            continue
        if (text := dumps(new)) != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
        memory[name] = fingerprint(path)
        MEMORY.write_text(json.dumps(memory, indent=1, sort_keys=True) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
