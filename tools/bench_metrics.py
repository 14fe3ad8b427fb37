"""Time `evaluate_lvis` beside the `lvis` package, in one run, on a made file.

python tools/bench_metrics.py --images 200 --categories 1230 --detections 300
"""

import argparse
import copy
import logging
import statistics
import time
from unittest.mock import patch

import numpy as np
from lvis import LVIS, LVISEval, LVISResults

from eql_repro.metrics import evaluate_lvis


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def made(images: int, categories: int, detections: int) -> tuple[dict, list[dict]]:
    """Ten objects an image; detections are these, moved, and guesses among them."""
    rng = np.random.default_rng(0)
    names = [{"name": f"c{j}", "frequency": "rcf"[j % 3]} for j in range(categories)]
    truth = {"images": [], "annotations": []}
    truth["categories"] = [row | {"id": j + 1} for j, row in enumerate(names)]
    rows = []
    for i in range(images):
        known = (rng.choice(categories, 20, replace=False) + 1).tolist()
        image = {
            "id": i + 1,
            "height": 480,
            "width": 640,
            "neg_category_ids": known[10:],
        }
        truth["images"].append(image | {"not_exhaustive_category_ids": known[:1]})
        boxes = np.concatenate(
            [rng.uniform(0, 400, (10, 2)), rng.uniform(10, 200, (10, 2))], 1
        )
        for j, box in zip(known, boxes.tolist(), strict=False):
            ids = {"id": len(truth["annotations"]) + 1, "image_id": i + 1}
            ids |= {"category_id": j, "bbox": box, "area": box[2] * box[3]}
            truth["annotations"].append(ids | {"segmentation": rectangle(*box)})
        for n in range(detections):
            box = boxes[n % 10] * rng.uniform(0.9, 1.1, 4)
            j = known[n % 20] if n % 2 else int(rng.integers(categories)) + 1
            row = {"image_id": i + 1, "category_id": j, "bbox": box.tolist()}
            row["segmentation"] = rectangle(*row["bbox"])
            rows.append(row | {"score": float(rng.random())})
    return truth, rows


def direct(truth: dict, rows: list[dict], kind: str) -> float:
    """AP by the `lvis` package, as its own script does it."""
    with patch.object(LVIS, "_load_json", lambda self, data: data):
        data = LVIS(truth)
        evaluation = LVISEval(data, LVISResults(data, rows), kind)
    with patch.object(np, "float", float, create=True):
        evaluation.run()
    return evaluation.results["AP"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--categories", type=int, default=1230)
    parser.add_argument("--detections", type=int, default=300, help="an image")
    parser.add_argument("--repeats", type=int, default=3)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    logging.disable(logging.WARNING)
    truth, rows = made(**options)
    print(", ".join(f"{count} {name}" for name, count in options.items()))
    for kind in ("bbox", "segm"):
        ours, theirs = [], []
        for _ in range(repeats):  # in turn, so that a busy machine slows both
            copies = copy.deepcopy((truth, rows))  # the package changes what it gets
            times = [time.perf_counter()]
            ap = evaluate_lvis(truth, rows, [kind])[kind]["AP"]
            times.append(time.perf_counter())
            assert direct(*copies, kind) == ap
            times.append(time.perf_counter())
            ours.append(times[1] - times[0])
            theirs.append(times[2] - times[1])
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        seconds = [f"{statistics.median(times):.2f} s" for times in (ours, theirs)]
        print(f"{kind}: evaluate_lvis {seconds[0]}, lvis {seconds[1]}, ratios", end=" ")
        print(*(f"{ratio:.1f}" for ratio in ratios))


if __name__ == "__main__":
    main()
