"""What the chapter of LVIS evaluation cannot hold: the reference, real files, errors.

AP is compared with `LVISEval` called directly, and must be equal to the last bit.
"""

import copy
import json
import logging
import math
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from eql_repro import encoded_masks, evaluation
from eql_repro.detections import (
    DetectionWriter,
    detections_from,
    merge_detections,
    read_detections,
)
from eql_repro.evaluation import (
    detection_calibration,
    draw_detections,
    evaluate_lvis,
    per_class_frame,
    precision_recall,
)
from eql_repro.metrics import calibration

for module in ("hotcoco", "lvis", "pycocotools", "pandas"):
    pytest.importorskip(module, reason="needs eql_repro[run]")

from lvis import LVIS, LVISEval  # noqa: E402
from pycocotools import mask as coco  # noqa: E402

KINDS, ENGINES = ("bbox", "segm"), ("hotcoco", "lvis")
SIDE = 240  # of the made images, in pixels


# Made files


def ellipse(x, y, w, h, height, width, text=True):
    """RLE of the ellipse inside a box; its area is not the box's."""
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    inside = ((columns - x) / w - 0.5) ** 2 + ((rows - y) / h - 0.5) ** 2 <= 0.25
    rle = coco.encode(np.asfortranarray(inside.astype(np.uint8)))
    return rle | {"counts": rle["counts"].decode()} if text else rle


def outline(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x + w / 4, y + h]]


def made_truth(rng, images=24, classes=12):
    """All three groups and sizes, negatives, unmarked instances; ids with gaps."""
    ids = [3 * j + 2 for j in range(classes)]
    truth = {"images": [], "annotations": [], "categories": []}
    for k, j in enumerate(ids):
        letter = {"name": f"c{j}", "frequency": "rcf"[k % 3]}
        truth["categories"].insert(0, {"id": j} | letter)  # falling: to be sorted
    for i in range(images):
        shown, others = np.split(rng.permutation(ids), [rng.integers(0, 5)])
        lists = {"neg_category_ids": others[:3].tolist()}
        lists["not_exhaustive_category_ids"] = shown[:1].tolist() if i % 3 else []
        sides = {"height": SIDE, "width": SIDE}
        truth["images"].append({"id": 7 * i + 1} | lists | sides)
        for j in shown.tolist() * 2:
            w, h = rng.choice([20, 60, 110], 2) + rng.uniform(0, 9, 2)
            x, y = rng.uniform(0, SIDE - 125, 2)
            box = [float(v) for v in (x, y, w, h)]
            row = {"id": len(truth["annotations"]) + 1, "image_id": 7 * i + 1}
            mask = ellipse(*box, SIDE, SIDE) if i % 2 else outline(*box)
            row |= {"category_id": j, "bbox": box, "area": float(w * h * 0.8)}
            truth["annotations"].append(row | {"segmentation": mask})
    return truth


def made_detections(rng, truth, extra=6):
    """Objects found nearly, then guesses; tied scores; RLE as str and as bytes."""
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    places = [
        (a["image_id"], a["category_id"], a["bbox"]) for a in truth["annotations"]
    ]
    lists = {i["id"]: i["neg_category_ids"] for i in truth["images"]}
    ids = [c["id"] for c in truth["categories"]]
    for image, (height, width) in sizes.items():
        for _ in range(extra):
            pool = lists[image] if rng.random() < 0.7 and lists[image] else ids
            box = [*rng.uniform(0, 0.6, 2), *rng.uniform(0.05, 0.4, 2)]
            box = (np.array(box) * [width, height, width, height]).tolist()
            places.append((image, int(rng.choice(pool)), box))
    rows = []
    for n, (image, j, (x, y, w, h)) in enumerate(places * 2):
        dx, dy, dw, dh = rng.normal(0, 0.06, 4)
        box = [x + dx * w, y + dy * h, w * math.exp(dw), h * math.exp(dh)]
        row = {"image_id": image, "category_id": j, "bbox": box}
        row["score"] = round(float(rng.uniform(0, 1)), 1)
        row["segmentation"] = ellipse(*box, *sizes[image], text=bool(n % 2))
        rows.append(row)
    return [rows[i] for i in rng.permutation(len(rows))]


def reference(truth, rows, kind, path, monkeypatch):
    """The `lvis` package alone: its nine numbers and AP by category."""
    path.write_text(json.dumps(truth))
    with monkeypatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)
        evaluation = LVISEval(LVIS(path), copy.deepcopy(rows), kind)
        evaluation.run()
    result = {
        name: math.nan if value == -1 else float(value)
        for name, value in evaluation.results.items()
        if name.startswith("AP")
    }
    precision = evaluation.eval["precision"][..., 0]
    parts = np.moveaxis(precision, 2, 0)
    means = [float(p[p > -1].mean()) if (p > -1).any() else math.nan for p in parts]
    return result | {
        "per_class": dict(zip(evaluation.params.cat_ids, means, strict=True))
    }


def assert_same(truth, rows, path, monkeypatch, engines=ENGINES):
    """The engines give the reference's bits; returns the results."""
    expected = {k: reference(truth, rows, k, path, monkeypatch) for k in KINDS}
    for engine in engines:
        found = evaluate_lvis(truth, rows, engine=engine)
        for kind in KINDS:
            assert {k: repr(v) for k, v in found[kind].items()} == {
                k: repr(v) for k, v in expected[kind].items()
            }
    return found


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    truth = made_truth(rng)
    return truth, made_detections(rng, truth)


# The reference


def test_both_engines_equal_the_reference_on_made_files(made, tmp_path, monkeypatch):
    truth, rows = made
    assert len({row["score"] for row in rows}) < len(rows) / 10  # ties
    found = assert_same(truth, rows, tmp_path / "truth.json", monkeypatch)
    for result in found.values():
        numbers = list(result.values())[:-1]
        assert len({*numbers}) == 9 and all(0.02 < v < 0.98 for v in numbers)


def test_results_do_not_depend_on_the_images_taken_at_a_time(made, monkeypatch):
    truth, rows = made
    whole = repr(evaluate_lvis(truth, rows))
    taken = []

    def few(*parts, blocks=evaluation._blocks):
        taken.extend(len(images) for images, *_ in blocks(*parts, size=3))
        return blocks(*parts, size=3)

    monkeypatch.setattr(evaluation, "_blocks", few)
    assert repr(evaluate_lvis(truth, rows)) == whole
    assert len(taken) > 4 and max(taken) == 3


def test_never_predicted_categories_and_crowded_images(made, tmp_path, monkeypatch):
    truth, rows = made
    silent = {c["id"] for c in truth["categories"][:3]}
    rows = [row for row in rows if row["category_id"] not in silent]
    first = truth["images"][0]["id"]
    crowd = [row | {"image_id": first, "score": row["score"] / 2} for row in rows]
    assert len(crowd) > 300
    found = assert_same(truth, rows + crowd, tmp_path / "truth.json", monkeypatch)
    assert all(found["bbox"]["per_class"][j] in (0,) for j in silent)


def test_boxes_and_annotations_without_area(made, tmp_path, monkeypatch):
    truth, rows = copy.deepcopy(made)
    for row in truth["annotations"][::5]:
        row["area"] = 0
    for n, row in enumerate(rows[::4]):
        row["bbox"] = [*row["bbox"][:2], *[(0, 5), (5, 0), (-4, 5), (-4, -5)][n % 4]]
    assert_same(truth, rows, tmp_path / "truth.json", monkeypatch)


def test_real_annotations(tmp_path, monkeypatch):
    if not (folder := os.environ.get("EQL_DATA")):
        pytest.skip("EQL_DATA is not set: no LVIS file")
    name = "lvis_v0.5_val_64"
    truth = json.loads(Path(folder, name, f"{name}.json").read_text())
    rows = made_detections(np.random.default_rng(1), truth, extra=20)
    path = tmp_path / "truth.json"
    found = assert_same(truth, rows, path, monkeypatch, engines=["hotcoco"])  # seconds
    assert all(0.02 < v < 0.98 for v in list(found["segm"].values())[:-1])
    frame = per_class_frame(truth, found)
    assert (frame["instances"] > 0).sum() == 142 and frame["instances"].sum() == 674
    assert (frame["AP_bbox"].notna() == (frame["instances"] > 0)).all()


def test_share_of_absent_categories_that_real_images_list_as_negative():
    """The page `effects` states 9.5 categories, 0.8 %, 2.9 for one, and groups."""
    if not (folder := os.environ.get("EQL_DATA")):
        pytest.skip("EQL_DATA is not set: no LVIS file")
    name = "lvis_v0.5_val_64"
    truth = json.loads(Path(folder, name, f"{name}.json").read_text())
    listed = sum(len(image["neg_category_ids"]) for image in truth["images"])
    pairs = {(row["image_id"], row["category_id"]) for row in truth["annotations"]}
    absent = len(truth["images"]) * len(truth["categories"]) - len(pairs)
    assert round(listed / len(truth["images"]), 1) == 9.5
    assert round(100 * listed / absent, 1) == 0.8
    assert round(listed / len(pairs), 2) == 2.87
    group = {row["id"]: row["frequency"] for row in truth["categories"]}
    lists = [j for image in truth["images"] for j in image["neg_category_ids"]]
    negative, shown = (
        Counter(group[j] for j in ids) for ids in (lists, [j for _, j in pairs])
    )
    size = Counter(group.values())
    share = {g: negative[g] / len(truth["images"]) / size[g] for g in "rcf"}
    assert {g: round(100 * v, 1) for g, v in share.items()} == dict(r=0.4, c=1, f=1.1)
    assert shown["r"] == 1 and round(negative["c"] / shown["c"]) == 17


def test_the_reference_leaves_no_trace(made, caplog, monkeypatch):
    truth, rows = made
    with caplog.at_level(logging.WARNING):
        evaluate_lvis(truth, rows[:20], engine="lvis")
    assert not caplog.records and not hasattr(np, "float")

    def fail(self):
        assert np.float is float
        raise RuntimeError("stopped")

    monkeypatch.setattr(LVISEval, "accumulate", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate_lvis(truth, rows[:20], engine="lvis")
    assert not hasattr(np, "float") and not logging.getLogger("lvis.results").disabled


# The rules of LVIS, one at a time


def one_object(**lists):
    """One image with an object of category 1; category 2 is there in the file only."""
    image = {"id": 5, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    names = [(1, "f"), (2, "r")]
    row = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [10, 10, 40, 40]}
    row |= {"area": 1600, "segmentation": outline(10, 10, 40, 40)}
    return {
        "images": [image | {"height": SIDE, "width": SIDE} | lists],
        "categories": [{"id": j, "name": "x", "frequency": f} for j, f in names],
        "annotations": [row],
    }


def guess(category=1, score=0.5, box=(10, 10, 40, 40), image=5):
    row = {"image_id": image, "category_id": category, "bbox": [*box], "score": score}
    return row | {"segmentation": outline(*box)}


AWAY = (100, 100, 40, 40)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_negative_and_not_exhaustive_sets(engine, kind):
    def ap(rows, **lists):
        result = evaluate_lvis(one_object(**lists), rows, [kind], engine)
        return result[kind]["per_class"][1]

    wrong_first = [guess(score=0.9, box=AWAY), guess()]
    assert ap([guess()]) == pytest.approx(1)
    assert ap(wrong_first) == pytest.approx(0.5)
    assert ap(wrong_first, not_exhaustive_category_ids=[1]) == pytest.approx(1)

    truth = one_object()
    other = {"neg_category_ids": [], "not_exhaustive_category_ids": [], "id": 6}
    truth["images"].append(truth["images"][0] | other)
    elsewhere = [guess(score=0.9, image=6), guess()]
    found = evaluate_lvis(truth, elsewhere, [kind], engine)[kind]
    assert found["AP"] == pytest.approx(1)  # nobody looked: dropped
    truth["images"][1]["neg_category_ids"] = [1]
    found = evaluate_lvis(truth, elsewhere, [kind], engine)[kind]
    assert found["AP"] == pytest.approx(0.5)  # known to be absent: wrong

    def of(negatives):
        found = evaluate_lvis(truth, elsewhere, [kind], engine, negatives=negatives)
        return found[kind]["AP"]

    assert [of(0), of(9)] == pytest.approx([1, 0.5]) and of(None) == of(9)
    truth["images"][1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": [1]}
    assert of(9) == pytest.approx(1)  # not known to be absent: never drawn
    with pytest.raises(ValueError, match="negatives: got -1, expected at least 0"):
        of(-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_300_detections_an_image_over_all_categories(engine):
    truth = one_object()
    for others, expected in [(299, 1), (300, 0)]:
        for box in (AWAY, (100, 100, 0, 40)):  # one without area counts too
            rows = [guess()] + [guess(2, 0.9, box)] * others
            result = evaluate_lvis(truth, rows, engine=engine)
            found = [result[kind]["AP"] for kind in KINDS]
            assert found == pytest.approx([expected] * 2)


def test_boxes_and_masks_are_judged_apart():
    triangle = [[10, 10, 50, 10, 10, 50]]
    rows = [guess() | {"segmentation": triangle}]
    result = evaluate_lvis(one_object(), rows)
    assert result["bbox"]["AP"] == pytest.approx(1)
    assert result["segm"]["AP"] < 0.5 and result["segm"]["AP75"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_annotation_with_id_0_can_be_matched(engine):
    truth = one_object()
    truth["annotations"][0]["id"] = 0
    assert evaluate_lvis(truth, [guess()], engine=engine)["bbox"]["AP"] > 0.99


# Where files come from


SHAPES = {
    "???": {"counts": "???"},
    "empty": {"counts": ""},
    "cut": {"counts": "P"},
    "no text of an RLE": {"counts": "!é"},
    "bytes": {"counts": b"???"},
    "15 pixels": {"counts": [10, 5]},
    "fractions": {"counts": [10.0, 90.0]},
    "negative": {"counts": [110, -10]},
    "none": {"counts": None},
    "two numbers": [[1, 2]],
    "four numbers": [[1, 2, 3, 4]],
    "seven numbers": [[1, 2, 3, 4, 5, 6, 7]],
    "flat": [1, 2, 3, 4, 5, 6],
    "nothing": [[]],
    "no number": [[1, 1, 9, 1, 9, math.nan]],
    "far away": [[1, 1, 9, 1, 9, 1e8]],
    "text": [[1, 1, 9, 1, 9, "9"]],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("file", [True, False])
def test_a_broken_mask_is_no_empty_one(tmp_path, name, file):
    shape, size = SHAPES[name], {"size": [SIDE, SIDE]}
    mask = {"segmentation": size | shape if isinstance(shape, dict) else shape}
    truth, rows = one_object(), [guess(), guess() | mask]
    if file and name != "bytes":
        rows = tmp_path / "rows.json"
        rows.write_text(json.dumps([guess(), guess() | mask]))
    with pytest.raises(
        ValueError, match=r"^detections: row 1 must hold (polygons|counts)"
    ):
        evaluate_lvis(truth, rows)
    assert evaluate_lvis(truth, rows, ["bbox"])["bbox"]["AP"] > 0.99
    truth["annotations"][0] |= mask
    with pytest.raises(ValueError, match="annotation 1 must hold (polygons|counts)"):
        evaluate_lvis(truth, [guess()])


def test_pixels_of_compressed_masks_are_those_of_their_images():
    rng = np.random.default_rng(0)
    for batch in (1, 7, 300):
        sizes = rng.integers(1, 90, (batch, 2))
        fields = [rng.random(s) < rng.choice([0, 0.01, 0.5, 1]) for s in sizes]
        masks = [coco.encode(np.asfortranarray(f.astype(np.uint8))) for f in fields]
        texts = [mask["counts"] for mask in masks]
        assert encoded_masks._pixels(texts).tolist() == sizes.prod(1).tolist()


def test_sources_are_alike_and_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(2)
    truth = made_truth(rng, images=6)
    rows = made_detections(rng, truth)
    before = copy.deepcopy((truth, rows))
    expected = repr(evaluate_lvis(truth, rows))

    class Data:
        def to_lvis(self):
            return truth

    paths = [tmp_path / name for name in ("truth.json", "rows.json", "rows.jsonl")]
    paths[0].write_text(json.dumps(truth))
    paths[1].write_text(json.dumps(rows, default=bytes.decode))
    with DetectionWriter(paths[2]) as writer:
        assert writer.write(rows) == len(rows)
    for source in (Data(), paths[0], str(paths[0])):
        assert repr(evaluate_lvis(source, rows)) == expected
        boxes = evaluate_lvis(source, rows, ["bbox"])
        assert repr(boxes) == repr(evaluate_lvis(truth, rows, ["bbox"]))
    for source in (iter(rows), *paths[1:], str(paths[2])):
        assert repr(evaluate_lvis(truth, source)) == expected
    evaluate_lvis(truth, rows, engine="lvis")
    assert (truth, rows) == before


def test_shards_merge_to_the_whole(made, tmp_path):
    truth, rows = made
    images = [image["id"] for image in truth["images"]]
    shards = [images[0::2], images[1::2] + images[:1], []]  # padded, and an empty one
    paths = [tmp_path / f"rank{rank}.jsonl" for rank in range(3)]
    for path, shard in zip(paths, shards, strict=True):
        with DetectionWriter(path) as writer:
            for image in shard:
                writer.write(row for row in rows if row["image_id"] == image)
    merged = tmp_path / "merged.jsonl"
    assert merge_detections(paths, merged) == len(rows)
    assert repr(evaluate_lvis(truth, merged)) == repr(evaluate_lvis(truth, rows))


def test_a_missing_shard_leaves_the_joined_file_as_it_was(tmp_path):
    out, shard = tmp_path / "out.jsonl", tmp_path / "shard.jsonl"
    shard.write_text("")
    for before in (None, "before"):
        if before:
            out.write_text(before)
        with pytest.raises(FileNotFoundError, match="missing.jsonl"):
            merge_detections([shard, tmp_path / "missing.jsonl"], out)
        assert (out.read_text() if out.exists() else None) == before


@pytest.mark.parametrize("end", ['{"image_id": 5, "cat', "[1]"])
def test_a_cut_shard_leaves_the_joined_file_as_it_was(tmp_path, end):
    out, shard = tmp_path / "out.jsonl", tmp_path / "shard.jsonl"
    out.write_text("before")
    with DetectionWriter(shard) as writer:
        writer.write([guess()])
    shard.write_text(shard.read_text() + end)
    with pytest.raises(ValueError, match="line 2: not JSON|row 0 must hold"):
        merge_detections([shard], out)
    assert out.read_text() == "before" and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("field", ["image_id", "category_id"])
@pytest.mark.parametrize("value", [2**53 + 1, 2**62 + 3, -(2**60), 10**400])
def test_ids_that_no_float_holds_are_refused(tmp_path, field, value):
    rows, path = [guess(), guess() | {field: value}], tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    for source in (rows, path):
        with pytest.raises(ValueError, match="row 1: ids must be at most 2.*53"):
            read_detections(source)


def test_a_number_that_no_float_holds_is_refused():
    with pytest.raises(ValueError, match="row 0 must hold"):
        read_detections([guess() | {"score": 10**400}])


def test_writing_and_merging_take_little_memory(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    tracemalloc.start()
    for k, path in enumerate(paths):
        with DetectionWriter(path) as writer:
            for image in range(100 * k, 100 * k + 100):
                writer.write([guess(image=image)] * 50)
    merge_detections(paths, tmp_path / "all.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "all.jsonl").stat().st_size
    assert size > 1_000_000 and peak < size / 4


def test_a_killed_writer_leaves_whole_rows_and_a_clear_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    writer = DetectionWriter(path)
    assert writer.write([guess()]) == 1
    with pytest.raises(ValueError, match="row 1 must hold"):
        writer.write([guess(), {}])
    assert len(path.read_text().splitlines()) == 1  # written at once, or not at all
    path.write_text(path.read_text() + '{"image_id": 5, "cat')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
        evaluate_lvis(one_object(), path)
    with pytest.raises(ValueError, match="line 2: not JSON"):
        merge_detections([path], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="is one of the files"):
        merge_detections([path], path)
    with pytest.raises(ValueError, match="ending in .jsonl"):
        DetectionWriter(tmp_path / "rows.json")


# Wrong input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": math.nan}, "row 1 must be finite"),
        ({"bbox": [0, 0, math.inf, 1]}, "row 1 must be finite"),
        ({"bbox": [1, 2, 3]}, "row 1 must hold image_id"),
        ({"bbox": None}, "row 1 must hold image_id"),
        ({"score": "0.5"}, "row 1 must hold image_id"),
        ({"image_id": 5.0}, "row 1 must hold image_id"),
        ({"image_id": 9}, "image_id 9 or category_id 1 of row 1"),
        ({"category_id": 9}, "image_id 5 or category_id 9 of row 1"),
        ({"segmentation": None}, "row 1 must hold segmentation"),
        ({"segmentation": 5}, "row 1 must hold segmentation"),
        ({"segmentation": torch.ones(2, 2)}, "row 1 must hold segmentation"),
        (
            {"segmentation": {"counts": "ab"}},
            r"row 1 must hold an RLE of size .*, got None",
        ),
        (
            {"segmentation": {"size": [3, 3], "counts": ""}},
            r"row 1 must hold an RLE of size .*, got \[3, 3\]",
        ),
    ],
)
def test_wrong_detections(change, message):
    with pytest.raises(ValueError, match=f"detections: {message}"):
        evaluate_lvis(one_object(), [guess(), guess() | change])


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("images", {"neg_category_ids": None}, r"image 5 has no \['neg_category_ids'"),
        ("images", {"neg_category_ids": [0]}, r"neg_category_ids: .*not listed: 0"),
        ("images", {"neg_category_ids": ["2"]}, "neg_category_ids: .*not listed: 2"),
        ("images", {"not_exhaustive_category_ids": 2}, "of image 5 is not a list"),
        ("images", {"height": None}, r"image 5 has no \['height'"),
        ("categories", {"frequency": None}, r"category 1 has no \['frequency'"),
        ("categories", {"frequency": "x"}, "frequency must be r, c or f"),
        ("annotations", {"bbox": [1, 2, 3]}, "annotation 1 must hold"),
        ("annotations", {"area": None}, "annotation 1 must hold"),
        ("annotations", {"area": math.nan}, "annotation 1 must be finite"),
        ("annotations", {"segmentation": []}, "annotation 1 must hold segmentation"),
        ("annotations", {"iscrowd": 1}, "annotation 1 is a crowd"),
        ("annotations", {"image_id": 9}, "not listed"),
    ],
)
def test_wrong_ground_truth(key, change, message):
    truth = one_object()
    truth[key][0] |= change
    with pytest.raises(ValueError, match=f"ground_truth: .*{message}"):
        evaluate_lvis(truth, [guess()])


def test_drawn_negatives_need_no_lists():
    truth, rows = one_object(), [guess(), guess(2, box=AWAY)]
    expected = evaluate_lvis(truth, rows, negatives=1)
    for lists in ("neg_category_ids", "not_exhaustive_category_ids"):
        del truth["images"][0][lists]
        assert repr(evaluate_lvis(truth, rows, negatives=1)) == repr(expected)
        with pytest.raises(ValueError, match=r"image 5 has no \['neg_category_ids'"):
            evaluate_lvis(truth, rows)
    assert len(per_class_frame(truth, expected)) == 2


@pytest.mark.parametrize("negatives", [1.5, "2", [1]])
def test_negatives_are_a_whole_number(negatives):
    with pytest.raises(TypeError, match="negatives: got .*whole number"):
        evaluate_lvis(one_object(), [guess()], negatives=negatives)
    assert evaluate_lvis(one_object(), [guess()], negatives=np.int64(1))


def test_wrong_sources_and_options(tmp_path):
    truth, rows = one_object(), [guess()]
    with pytest.raises(ValueError, match="ground_truth: .*images"):
        evaluate_lvis({}, rows)
    with pytest.raises(FileNotFoundError):
        evaluate_lvis(tmp_path / "none.json", rows)
    with pytest.raises(ValueError, match="engine: got 'coco'"):
        evaluate_lvis(truth, rows, engine="coco")
    with pytest.raises(ValueError, match=r"engine: got \['lvis'\]"):
        evaluate_lvis(truth, rows, engine=["lvis"])
    for groups in ("", "frequent"):
        with pytest.raises(ValueError, match=f"groups: got '{groups}'"):
            detection_calibration(truth, rows, groups=groups)
    for kinds in ("bbox", ["keypoints"]):
        with pytest.raises(ValueError, match="iou_types: got"):
            evaluate_lvis(truth, rows, kinds)
    for iou in (0.52, 0.45, 1, 50):
        with pytest.raises(ValueError, match=f"iou: got {iou}"):
            precision_recall(truth, rows, iou=iou)
    with pytest.raises(ValueError, match="bins: got 0"):
        detection_calibration(truth, rows, bins=0)
    with pytest.raises(ValueError, match=r"image: got shape \[4, 5, 3\]"):
        draw_detections(np.zeros((4, 5, 3)), rows)


@pytest.mark.parametrize("msgspec", [True, False])
def test_a_file_of_another_shape_is_refused_by_name(tmp_path, monkeypatch, msgspec):
    if not msgspec:
        monkeypatch.setattr("eql_repro.detections._msgspec", None)
    file, good = tmp_path / "some.json", json.dumps([guess()])
    for text in ("\ufeff" + good, "nonsense]", "]", "", "null", good[:-9]):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"some\.json: "):
            evaluate_lvis(one_object(), file)
        with pytest.raises(ValueError, match=r"some\.json: "):
            evaluate_lvis(file, [guess()])
    file.write_text("[]")
    assert len(read_detections(file)[0]) == 0


def test_detections_from_wrong_outputs():
    output = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([1])}
    output["scores"] = torch.ones(1)
    with pytest.raises(ValueError, match="image_ids: got 2 for 1"):
        detections_from([output], [1, 2], [7, 8])
    with pytest.raises(ValueError, match=r"image 3 exceed \[0, 1\)"):
        detections_from([output], [3], [7])
    with pytest.raises(ValueError, match="zip"):
        detections_from([output | {"scores": torch.ones(2)}], [3], [7, 8])
    assert len(detections_from([output, output], [3, 3], [7, 8])) == 1  # padding
    for masks in (torch.ones(1, 1, 9, 9), np.ones((1, 9, 9))):
        with pytest.raises(ValueError, match="masks must be RLE or polygons, got a"):
            detections_from([output | {"masks": masks}], [3], [7, 8])
    assert torch.equal(output["boxes"], torch.zeros(1, 4))


def test_a_mask_of_pixels_is_not_written(tmp_path):
    with DetectionWriter(tmp_path / "rows.jsonl") as writer:
        with pytest.raises(ValueError, match="row 1 must hold RLE or polygons, got a"):
            writer.write([guess(), guess() | {"segmentation": torch.ones(9, 9)}])
        assert writer.write([guess() | {"segmentation": None}]) == 1


def test_an_image_that_comes_again_is_written_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    with DetectionWriter(path) as writer:
        counts = [writer.write([guess(), guess(2)]), writer.write([])]
        counts += [writer.write([guess()]), writer.write([guess(image=6)])]
    assert counts == [2, 0, 0, 1]
    path.write_text(path.read_text() + "\n \n")  # blank lines hold no row
    assert merge_detections([path], tmp_path / "all.jsonl") == 3
    assert len(read_detections(tmp_path / "all.jsonl")[0]) == 3


# What looks behind AP


@pytest.mark.parametrize("kind", KINDS)
def test_curves_hold_the_ap_of_every_group_and_category(made, kind):
    truth, rows = made
    result = evaluate_lvis(truth, rows, [kind])[kind]
    curves = [
        precision_recall(truth, rows, iou=u / 100, iou_type=kind)
        for u in range(50, 100, 5)
    ]
    for name, group in dict(AP="all", APr="rare", APc="common", APf="frequent").items():
        mean = np.mean([curve[group] for curve in curves])
        assert mean == pytest.approx(result[name], abs=1e-12)
    for j, expected in result["per_class"].items():
        mean = np.mean([curve["per_class"][j] for curve in curves])
        assert mean == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert curves[0]["all"].mean() == pytest.approx(result["AP50"])


def test_calibration_counts_right_and_wrong_but_not_dropped_or_ignored():
    truth = one_object(neg_category_ids=[2])
    rows = [guess(score=0.95), guess(score=0.15, box=AWAY), guess(2, 0.15, AWAY)]
    found = detection_calibration(truth, rows, bins=10)
    assert [found["count"][n] for n in (1, 9)] == [2, 1] and sum(found["count"]) == 3
    assert [found["accuracy"][n] for n in (0, 1, 9)] == [None, 0, 1]
    assert found["confidence"][9] == pytest.approx(0.95)
    assert found["edges"] == pytest.approx(np.linspace(0, 1, 11))
    assert found.keys() == calibration(torch.eye(2), torch.arange(2)).keys()
    truth = one_object(not_exhaustive_category_ids=[1])  # ignores one, drops one
    assert sum(detection_calibration(truth, rows)["count"]) == 1


def test_a_picture_has_every_box_mask_and_score():
    pytest.importorskip("matplotlib", reason="needs eql_repro[run]").use("agg")
    rle = guess() | {"segmentation": ellipse(10, 10, 40, 40, 60, 80, text=False)}
    boxes = [{"bbox": [1, 2, 3, 4], "category_id": 1}]
    ax = draw_detections(
        torch.zeros(3, 60, 80), [guess(), rle], boxes, names={1: "cup"}
    )
    assert len(ax.patches) == 3 and len(ax.images) == 3
    assert [list(image.get_extent()) for image in ax.images] == [[0, 80, 60, 0]] * 3
    assert ax.patches[2].get_bbox().bounds == (1, 2, 3, 4)
    assert [patch.get_linestyle() for patch in ax.patches] == ["-", "-", "--"]
    assert [text.get_text() for text in ax.texts] == ["cup 0.50"] * 2


def test_an_evaluation_loads_no_torch(tmp_path):
    files = [tmp_path / name for name in ("truth.json", "rows.json")]
    for path, content in zip(files, (one_object(), [guess()]), strict=True):
        path.write_text(json.dumps(content))
    code = """
import sys
from eql_repro.evaluation import evaluate_lvis, per_class_frame, precision_recall
from eql_repro.detections import DetectionWriter
results = evaluate_lvis(*sys.argv[1:])
assert results["segm"]["AP"] > 0.99, results
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
