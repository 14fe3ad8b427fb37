"""Detection runs: processes, a lost process, and real LVIS photographs."""

import json
import multiprocessing
import os
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18
from two_processes import start_pair

from eql_repro.classify import build_loss
from eql_repro.detect import Detection, grouped_order, merged
from eql_repro.detections import DetectionWriter, read_detections
from eql_repro.evaluation import evaluate_lvis
from eql_repro.instances import read_annotations
from eql_repro.predict import evaluate_run, predict
from eql_repro.recipe_detect import POCKET
from eql_repro.scenes import Scenes, export_scenes
from eql_repro.training import Options, check_runs, load_run, train

pytest.importorskip("hotcoco")
SMALL = {
    "min_size": 64, "channels": 16, "hidden": 32, "proposals": (40, 20), "regions": 16,
}  # fmt: skip
TINY = replace(
    POCKET, name="tiny", loss="eql", lambda_=0.05, iterations=3, batch=4, warmup=0,
    detector_options=tuple((dict(POCKET.detector_options) | SMALL).items()),
)  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["eql_repro.training", "accelerate"])
DATA = os.environ.get("EQL_DATA")
PHOTOS = DATA and Path(DATA) / "lvis_v0.5_val_64"
real = pytest.mark.skipif(not DATA, reason="EQL_DATA is not set: no real photographs")


def one_of_two(rank: int, out: str, recipe, every: int) -> None:
    try:
        train([(recipe, 0)], out, Options(checkpoint_every=every))
    except ConnectionError as error:
        Path(out, f"said-{rank}").write_text(str(error))
        os._exit(2)


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "record.json").read_text())["curves"]["loss"]


def test_a_detector_without_masks_does_not_train_beside_one_with_masks():
    boxes = replace(TINY, name="boxes", network="faster_rcnn_r18_fpn")
    with pytest.raises(ValueError, match="'tiny' and 'boxes' differ in network"):
        check_runs([(TINY, 0), (boxes, 0)])


def test_two_processes_have_the_losses_of_one_with_the_whole_batch(tmp_path):
    options = (*TINY.detector_options, ("normalizer", "image"), ("norm", "frozen"))
    recipe = replace(TINY, name="frozen", detector_options=options, lr=1e-4)
    (alone,) = train([(recipe, 0)], tmp_path / "one")
    pair = start_pair(CONTEXT, one_of_two, str(tmp_path / "two"), recipe, 100)
    for process in pair:
        process.join(240)
    assert [process.exitcode for process in pair] == [0, 0]
    both = tmp_path / "two" / alone.name
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    rows = {
        json.loads(line)["image_id"]
        for line in (both / "detections.jsonl").read_text().splitlines()
    }
    assert {i % 2 for i in rows} == {0, 1}, "a process's detections are missing"


def test_a_lost_process_ends_the_run_and_it_resumes(tmp_path):
    recipe = replace(TINY, name="lost", iterations=40)
    pair = start_pair(CONTEXT, one_of_two, str(tmp_path), recipe, 2)
    path, end = tmp_path / "lost-s0" / "checkpoint.pt", time.monotonic() + 240
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(pair[1].pid, signal.SIGKILL)
    pair[0].join(240)
    assert pair[0].exitcode == 2
    assert "goes on from the last checkpoint" in (tmp_path / "said-0").read_text()
    reached = torch.load(path, weights_only=True)["iteration"]
    assert 0 < reached < 40
    (folder,) = train([(recipe, 0)], tmp_path)
    assert json.loads((folder / "record.json").read_text())["iterations"] == 40


def link_photos(folder: Path, images: int) -> None:
    """A folder of data with the photographs of fewest objects, to train and to test."""
    truth = json.loads((PHOTOS / "lvis_v0.5_val_64.json").read_text())
    known = read_annotations(truth)
    sizes = [(len(r.annotations), r.image["id"]) for r in known.records]
    chosen = [i for n, i in sorted(sizes) if n > 1][:images]
    truth["images"] = [row for row in truth["images"] if row["id"] in chosen]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in chosen]
    for name in ("train.json", "val.json"):
        (folder / name).write_text(json.dumps(truth))
    (folder / "val2017").symlink_to(PHOTOS / "val2017")


@real
def test_real_photographs_can_be_learned(tmp_path):
    link_photos(tmp_path, 3)
    options = dict(POCKET.detector_options)
    options |= {"min_size": 128, "max_size": 224}
    options |= {"anchor_sizes": (16, 32, 64, 128, 256)}
    recipe = replace(
        POCKET, name="photos", data="instances", profile="", num_classes=1230,
        loss="sigmoid", prior=0.001, iterations=110, batch=3, lr=1e-3, warmup=10,
        evaluations=1, augment=(), detector_options=tuple(options.items()),
    )  # fmt: skip
    (folder,) = train([(recipe, 0)], tmp_path, Options(data=str(tmp_path)))
    record = json.loads((folder / "record.json").read_text())
    assert record["metrics"]["APbbox"] > 0.5
    found, truth = folder / "detections.jsonl", tmp_path / "val.json"
    kinds = "bbox", "segm"
    engines = [repr(evaluate_lvis(truth, found, kinds, e)) for e in ("hotcoco", "lvis")]
    assert engines[0] == engines[1]
    assert (folder / "detections.png").stat().st_size > 100_000


def test_a_trained_detector_is_loaded_without_its_backbone_weights(tmp_path):
    weights = tmp_path / "r18.pt"
    torch.save(resnet18().state_dict(), weights)
    options = (*TINY.detector_options, ("pretrained_backbone", str(weights)))
    recipe = replace(TINY, name="pretrained", detector_options=options, iterations=1)
    (folder,) = train([(recipe, 0)], tmp_path)
    weights.unlink()
    model, loaded = load_run(folder)
    assert loaded == recipe and not model.training


def test_data_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="got 31, the data has 30"):
        Detection(replace(TINY, num_classes=31))


def test_predictions_have_the_category_ids_of_the_data(tmp_path):
    truth = json.loads(export_scenes(tmp_path, Scenes("pocket", "val"), 4).read_text())
    for row in truth["categories"]:
        row["id"] = 7 + 2 * row["id"]  # with gaps
    for row in truth["annotations"]:
        row["category_id"] = 7 + 2 * row["category_id"]
    for image in truth["images"]:
        image["neg_category_ids"] = image["not_exhaustive_category_ids"] = []
        (file,) = tmp_path.rglob(image["file_name"])
        image["file_name"] = str(file.relative_to(tmp_path))
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(truth))
    size = dict(min_size=64, channels=16, hidden=16, proposals=(20, 10), regions=8)
    options = tuple((dict(POCKET.detector_options) | size).items())
    recipe = replace(
        POCKET, name="tiny", data="instances", iterations=1, batch=2, warmup=0,
        milestones=(), evaluations=1, detector_options=options,
    )  # fmt: skip
    (folder,) = train([(recipe, 0)], tmp_path / "runs", Options(data=str(tmp_path)))
    images = sorted(tmp_path.rglob("*.png"))[:2]
    state = json.loads((folder / "run.json").read_text())
    ids = [row["id"] for row in truth["categories"]]
    file = predict(folder, images, tmp_path / "out", 0.0)
    found = {json.loads(x)["category_id"] for x in file.read_text().splitlines()}
    listed = json.loads(file.with_name("images.json").read_text())["categories"]
    assert found and found <= {*ids} and [row["id"] for row in listed] == ids
    assert state["category_ids"] == ids and len(state["counts"]) == 30
    truth["categories"][0]["name"], truth["categories"][1]["name"] = "b", "a"
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="data: an entry of names was .*, is b now"):
        evaluate_run(folder, str(tmp_path))
    Image.new("RGB", (80, 1)).save(tmp_path / "line.png")
    Image.new("RGB", (5000, 1)).save(tmp_path / "long.png")
    predict(folder, [tmp_path / "line.png"], tmp_path / "thin")  # a pixel is left
    for bad, said in (
        (tmp_path / "long.png", "long.png is 5000 x 1, expected a shorter side"),
        (tmp_path / "train.json", "train.json: not a readable image"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            predict(folder, [*images, bad], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    del state["category_ids"]
    (folder / "run.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="run.json has no category_ids"):
        predict(folder, images, tmp_path / "none")


def test_a_loaded_detector_has_the_tail_of_its_data(tmp_path):
    eql = replace(TINY, name="eql", loss="eql", lambda_=0.018, iterations=1, warmup=0,
                  milestones=(), evaluations=1)  # fmt: skip
    (folder,) = train([(eql, 0)], tmp_path)
    expected = build_loss(eql, Scenes("pocket").frequency).tail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_run(folder)
    assert expected.any() and torch.equal(model.roi_heads.class_loss.tail, expected)
    state = json.loads((folder / "run.json").read_text())
    del state["counts"]
    (folder / "run.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="no counts, a run of an older version"):
        load_run(folder)


def test_a_coco_file_that_cannot_be_evaluated_is_refused_before_training(tmp_path):
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "val2017" / "a.jpg")
    image = {"id": 5, "height": 32, "width": 32, "file_name": "a.jpg"}
    box = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81}
    box |= {"segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]], "iscrowd": 0}
    truth = {"images": [image], "annotations": [box]}
    truth |= {"categories": [{"id": 1, "name": "a"}]}
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps(truth))
    recipe = replace(TINY, data="instances", profile="", num_classes=1)
    with pytest.raises(ValueError, match=r"val\.json .*image 5 has no \['neg_cat"):
        Detection(recipe, str(tmp_path))
    image |= dict.fromkeys(("neg_category_ids", "not_exhaustive_category_ids"), [])
    truth["categories"][0]["frequency"] = "r"
    (tmp_path / "val.json").write_text(json.dumps(truth))  # train.json may be COCO's
    assert len(Detection(recipe, str(tmp_path)).test) == 1
    for change, said in (
        ({"name": "b"}, "1 is 'a' in training, 'b' in"),
        ({"id": 2}, ""),
    ):
        other = truth["categories"][0] | change
        rows = [box | {"category_id": other["id"]}]
        content = truth | {"categories": [other], "annotations": rows}
        (tmp_path / "val.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"data: category {said}"):
            Detection(recipe, str(tmp_path))


@pytest.mark.parametrize("high", [0, 14, 32, 50, 64])
def test_images_of_the_rarer_shape_are_trained_on(high):
    wide, seen = torch.arange(64) >= high, set()
    for epoch in range(20):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        seen |= {*grouped_order(order, wide, 32).tolist()}
    assert seen == {*range(64)}


def test_detections_of_a_killed_evaluation_are_not_merged(tmp_path):
    row = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    for k, score in ((0, 0.1), (1, 0.2), (10, 0.9)):
        with DetectionWriter(tmp_path / f"detections-{k}.jsonl") as writer:
            writer.write([row | {"image_id": k % 10, "score": score}])
            writer.write([row | {"image_id": 7, "score": score}] if k == 10 else [])
    assert read_detections(merged(tmp_path, 2))[0][:, 5].tolist() == [0.1, 0.2]
    assert [path.name for path in tmp_path.iterdir()] == ["detections.jsonl"]


def test_a_task_measures_masks_where_the_model_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr("eql_repro.detect.detect", lambda *rest: None)
    monkeypatch.setattr(
        "eql_repro.detect.measured", lambda data, path, kinds, *_: kinds
    )
    for first in "mask", "faster":  # runs of a process share the task of the first
        task = Detection(replace(TINY, network=f"{first}_rcnn_r18_fpn"))
        for kind in "mask", "faster":
            recipe = replace(TINY, network=f"{kind}_rcnn_r18_fpn")
            model = task.build_model(recipe, 0, build_loss(recipe, task.frequency))
            place = SimpleNamespace(process_index=0), 0, True, tmp_path
            kinds = task.evaluate(model, None, *place)
            assert kinds == ("bbox", "segm")[: 1 + (kind == "mask")]
