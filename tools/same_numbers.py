"""Show that a change of the code leaves the numbers of recorded runs as they were.

Usage: python tools/same_numbers.py COMMIT [RECIPE ...] [--iterations 50] [--work DIR]

Each recipe (default: all with records) whose code differs between COMMIT and this tree
is trained by both, with seed 0 and one thread, for at most the given iterations; its
schedule is shortened with it, and it is evaluated once. Where weights and results are
equal to the last bit, a row in records/same_numbers.csv says so, and the records keep
counting as today's code. Heads need their detector's finished run in WORK/runs. Commit
the change before.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("recipe", "before", "after", "commit", "iterations")
RESULTS = ("metrics", "per_class", "calibration", "curves", "examples")
CHILD = """\
import sys
from dataclasses import replace
from eql_repro.recipe import run_source, short
from eql_repro.recipes import RECIPES
from eql_repro.training import train
recipe, iterations, out = RECIPES[sys.argv[1]], int(sys.argv[2]), sys.argv[3]
if not out:
    print(run_source(recipe))
else:
    small = short(recipe, iterations) if iterations < recipe.iterations else recipe
    print(train([(replace(small, evaluations=1), 0)], out, force=True)[0])
"""


def ask(tree: Path, work: Path, recipe: str, iterations: int = 0, out: str = "") -> str:
    """Last line that a child prints which imports the package of a tree."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, recipe, str(iterations), out]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return done.stdout.splitlines()[-1]


def difference(before: Path, after: Path) -> str:
    """What differs between two finished runs; "" for nothing.

    A constant of the class loss may stand in the weights of one side alone.
    """
    old, new = (
        torch.load(f / "weights.pt", weights_only=True) for f in (before, after)
    )
    if [name for name in old.keys() ^ new.keys() if "class_loss." not in name]:
        return "names of weights"
    for name in [name for name in old if name in new]:
        if not torch.equal(old[name], new[name]):
            return name
    records = [json.loads((f / "record.json").read_text()) for f in (before, after)]
    differ = [k for k in RESULTS if records[0].get(k) != records[1].get(k)]
    return ", ".join(differ)


def compare(trees: list[Path], work: Path, recipe: str, iterations: int) -> list[str]:
    """Both hashes; raises RuntimeError where the code and the numbers differ."""
    hashes = [ask(tree, work, recipe) for tree in trees]
    if hashes[0] != hashes[1]:
        outs = [f"same/{side}" for side in ("before", "after")]
        pairs = zip(trees, outs, strict=True)
        runs = [work / ask(tree, work, recipe, iterations, out) for tree, out in pairs]
        if differs := difference(*runs):
            raise RuntimeError(f"other {differs}")
    return hashes


def add_row(file: Path, row: dict) -> None:
    """Append a row to the table, which is made where there is none."""
    new = not file.is_file()
    with open(file, "a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def git(*words: str) -> bytes:
    """What git prints in this tree."""
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True
    ).stdout


def main() -> int:
    """Compare the recipes; return 1 where one differs or cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="whose code made the records")
    parser.add_argument("recipes", nargs="*", help="default: all with records")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--work", type=Path, help="default: a folder of its own")
    args = parser.parse_intermixed_args()
    if git("status", "--porcelain", "--", "eql_repro").strip():
        parser.error("eql_repro has changes that are not committed")
    files = (ROOT / "records").glob("*-s*.json")
    names = args.recipes or sorted({f.stem.rpartition("-s")[0] for f in files})
    head, failed = git("rev-parse", "--short=12", "HEAD").decode().strip(), 0
    with tempfile.TemporaryDirectory() as folder:
        old = tarfile.open(fileobj=io.BytesIO(git("archive", args.commit, "eql_repro")))
        old.extractall(folder, filter="data")
        work = args.work or Path(folder)
        for name in names:
            try:
                before, after = compare(
                    [Path(folder), ROOT], work, name, args.iterations
                )
            except RuntimeError as error:
                print(f"{name}: {error}", flush=True)
                failed = 1
                continue
            print(
                f"{name}: the same {'code' if before == after else 'numbers'}",
                flush=True,
            )
            if before != after:
                row = [name, before, after, head, args.iterations]
                row = dict(zip(FIELDS, row, strict=True))
                add_row(ROOT / "records" / "same_numbers.csv", row)
    return failed


if __name__ == "__main__":
    sys.exit(main())
