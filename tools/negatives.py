"""Record how a run's AP depends on the negative categories of an image.

Usage: python tools/negatives.py RUN [RUN ...]

RUN is the folder of a finished run on scenes, a detector's or a head's. Its detections
are evaluated with the scenes' own negative categories and with 0, 1, 2, 5, 10, 20 and
all drawn for each image; a row of each is added to records/negatives.csv.
"""

import argparse
import csv
import sys
from pathlib import Path

from eql_repro.evaluation import evaluate_lvis, readable_metrics
from eql_repro.records import read_record
from eql_repro.scenes import Scenes

FILE = Path(__file__).resolve().parent.parent / "records" / "negatives.csv"
METRICS = ("APbbox", "APbboxr", "APbboxc", "APbboxf")
FIELDS = ("recipe", "seed", "negatives", *METRICS, "commit", "source")


def rows_of(run: Path) -> list[dict]:
    """A row for each number of negative categories; "own" are the scenes'."""
    record = read_record(run / "record.json")
    recipe = record.recipe
    if not recipe["profile"]:
        raise ValueError(f"{run}: {recipe['name']!r} was not run on scenes")
    truth = Scenes(recipe["profile"], "val").to_lvis()
    start = {"recipe": recipe["name"], "seed": record.seed}
    end = {"commit": record.commit, "source": record.source}
    rows = []
    for number in (None, 0, 1, 2, 5, 10, 20, recipe["num_classes"]):
        files = truth, run / "detections.jsonl", ["bbox"]
        found = readable_metrics(evaluate_lvis(*files, negatives=number))
        scores = {name: round(found[name], 6) for name in METRICS}
        label = {"negatives": "own" if number is None else number}
        rows.append(start | label | scores | end)
    return rows


def main() -> int:
    """Add the rows of each run that has none; return 1 where one has some."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    runs, there, failed = parser.parse_args().runs, set(), 0
    if FILE.is_file():
        with open(FILE, newline="", encoding="utf-8") as lines:
            there = {(row["recipe"], int(row["seed"])) for row in csv.DictReader(lines)}
    for run in runs:
        rows = rows_of(run)
        if (rows[0]["recipe"], rows[0]["seed"]) in there:
            print(f"{run}: its rows are in {FILE.name}")
            failed = 1
            continue
        new = not FILE.is_file()
        with open(FILE, "a", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        print(f"{run}: {len(rows)} rows", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
