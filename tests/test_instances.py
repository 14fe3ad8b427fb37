"""Annotation files and their images: every fault has one answer; real photographs."""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from eql_repro.annotations import decode_mask, read_annotations
from eql_repro.instances import (
    InstanceSet,
    check_data,
    check_images,
    find_images,
    image_folders,
    read_image,
)
from eql_repro.longtail import ClassFrequency

H, W = 20, 30
IMAGE = {"id": 6, "height": H, "width": W}
BESIDE = "kept boxes beside their polygons"
SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


@pytest.fixture
def truth():
    """Two images; categories 9 and 4; one square in the first image."""
    size = {"height": H, "width": W}
    return {
        "images": [
            {"id": 70, "file_name": "COCO_val2014_000000000070.jpg"} | size,
            {"id": 5, "file_name": "COCO_train2014_000000000005.jpg"} | size,
        ],
        "categories": [{"id": 9, "name": "fish"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 70, "category_id": 9, "bbox": [2, 2, 10, 10]}
            | {"segmentation": SQUARE, "area": 100.0, "iscrowd": 0}
        ],
    }


@pytest.fixture
def folder(tmp_path):
    for name in ("val2017/000000000070.jpg", "train2017/000000000005.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (W, H), "red").save(tmp_path / name)
    return tmp_path


def read_quietly(truth):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_annotations(truth)


@pytest.mark.parametrize(
    "key, row, text",
    [
        ("images", {"id": 70, "height": H, "width": W}, "images: .* twice: 70"),
        ("categories", {"id": 9, "name": "x"}, "categories: .* twice: 9"),
        ("annotations", {"id": 1}, "annotations: .* twice: 1"),
        ("annotations", {"id": None}, "without a whole 'id'"),
        ("annotations", 7, "rows without 'image_id': 7"),
        ("annotations", {"image_id": 6}, "image_ids that are not listed: 6"),
        ("annotations", {"image_id": [1]}, r"image_ids that are not listed: \[1\]"),
        ("annotations", {"image_id": None}, "image_ids that are not listed: None"),
        ("annotations", {"category_id": 0}, "category_ids that are not listed: 0"),
        ("annotations", {"bbox": [1, 2, 3]}, "'bbox' must be four numbers: id 2"),
        ("annotations", {"bbox": [1, 2, 3, "4"]}, "'bbox' must be four numbers"),
        ("annotations", {"area": "big"}, "'area' must be a number: id 2 has 'big'"),
        ("annotations", {"segmentation": 5}, "annotations: id 2 has"),
        ("images", {"id": 6, "height": 0, "width": W}, "'height' must be a whole"),
        ("images", {"id": 6, "height": H, "width": 7.5}, "'width' must be a whole"),
        ("images", {"id": 6, "height": H, "width": W}, "no 'file_name' and no"),
        ("images", IMAGE | {"coco_url": None}, "no 'file_name' and no"),
        ("images", IMAGE | {"coco_url": 5}, "'coco_url' must be text: id 6 has 5"),
        (
            "images",
            IMAGE | {"neg_category_ids": 5},
            "'neg_category_ids' must be a list",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_an_error(truth, key, row, text):
    if key == "annotations" and isinstance(row, dict):
        row = truth[key][0] | {"id": 2} | row
    truth[key].append(row)
    with pytest.raises(ValueError, match=text):
        read_annotations(truth)


@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_a_set_of_unknown_categories_is_an_error(truth, key):
    truth["images"][1][key] = [4, 77]
    with pytest.raises(ValueError, match=f"{key}: .*not listed: 77"):
        read_annotations(truth)


@pytest.mark.parametrize(
    "size, counts",
    [
        ([H, W], [9]),  # too few pixels
        ([H, W], "53<"),
        ([W, H], [10, 10, H * W - 20]),  # another size
        ([H, W], [-1, 1, H * W]),
        ([H, W], [10.0, 10.0, H * W - 20.0]),
        ([H, W], []),
    ],
)
def test_an_rle_that_does_not_cover_its_image_is_an_error(truth, size, counts):
    truth["annotations"][0]["segmentation"] = {"size": size, "counts": counts}
    with pytest.raises(ValueError, match="annotations: id 1 has"):
        read_annotations(truth)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": []}', '{"images": 5}'])
def test_an_error_names_a_file_that_is_no_annotation_file(tmp_path, text):
    (tmp_path / "cut.json").write_text(text)
    with pytest.raises(ValueError, match="cut.json: not ") as error:
        read_annotations(tmp_path / "cut.json")
    assert str(error.value).count("cut.json") == 1


@pytest.mark.parametrize(
    "change, kind, stays",
    [
        ({"iscrowd": 1}, "crowd regions", True),
        ({"bbox": [2, 2, 0, 10]}, "degenerate boxes", True),
        ({"bbox": [W - 0.5, 2, 10, 10]}, "degenerate boxes", True),
        ({"bbox": [2, 2, 10, 0.5]}, "degenerate boxes", True),
        ({"bbox": [2, H - 0.5, 10, 10]}, "degenerate boxes", True),
        ({"bbox": [2, float("nan"), 10, 10]}, "degenerate boxes", True),
        ({"bbox": [2, 2, -3, 10]}, "degenerate boxes", True),
        ({"bbox": [2, 2, float("inf"), 10]}, "degenerate boxes", True),
        ({"segmentation": []}, "empty segmentations", False),
        ({"segmentation": [[]]}, "empty segmentations", False),
        ({"segmentation": [[1, 1, 2, 2]]}, "empty segmentations", False),
        ({"segmentation": None}, "empty segmentations", False),
        ({"segmentation": {"size": [H, W], "counts": [600]}}, "empty segm", False),
    ],
)
def test_what_cannot_be_learned_from_is_skipped_and_counted(
    truth, folder, change, kind, stays
):
    truth["annotations"].append(truth["annotations"][0] | {"id": 2} | change)
    with pytest.warns(UserWarning, match=f"skipped {kind}.*: 1$"):
        data = InstanceSet(truth, folder)
    target = data[0][1]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 1
    assert [a["id"] for a in data.to_lvis()["annotations"]] == (
        [1, 2] if stays else [1]
    )


def test_a_good_file_gives_no_warning_and_is_not_changed(truth, folder):
    before = copy.deepcopy(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = InstanceSet(truth, folder)
    assert truth == before and not data.annotations.counted


def test_gaps_in_category_ids(truth, folder):
    data = InstanceSet(truth, folder)
    assert data[0][1]["labels"].tolist() == [1] and data.image_classes == [[1], []]
    assert data.category_ids.tolist() == [4, 9] and data.names == ("cat", "fish")
    assert data.frequency.counts.tolist() == [0, 1] and data.frequency.total == 2


def test_target_types(truth, folder):
    image, target = InstanceSet(truth, folder)[0]
    kinds = {k: (v.dtype, tuple(v.shape)) for k, v in target.items()}
    assert (image.dtype, image.shape) == (torch.uint8, (3, H, W))
    assert kinds == {
        "boxes": (torch.float32, (1, 4)),
        "labels": (torch.int64, (1,)),
        "masks": (torch.uint8, (1, H, W)),
        "area": (torch.float32, (1,)),
        "iscrowd": (torch.int64, (1,)),
        "image_id": (torch.int64, ()),
        "neg_labels": (torch.int64, (0,)),
        "not_exhaustive_labels": (torch.int64, (0,)),
    }
    _, empty = InstanceSet(truth, folder)[1]
    assert {k: v.dtype for k, v in empty.items()} == {k: v[0] for k, v in kinds.items()}
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, H, W)


def test_sets_of_categories_become_labels(truth, folder):
    truth["images"][0] |= {"neg_category_ids": [4], "not_exhaustive_category_ids": [9]}
    target = InstanceSet(truth, folder)[0][1]
    assert target["neg_labels"].tolist() == [0]
    assert target["not_exhaustive_labels"].tolist() == [1]


def test_every_form_of_a_mask_gives_the_same_mask(truth):
    coco = pytest.importorskip("pycocotools.mask")
    chance = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98, 1.0):
        mask = np.asfortranarray(chance.random((61, 47)) < share, dtype=np.uint8)
        rle = coco.encode(mask)
        edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=np.uint8(0)))
        runs = np.diff([0, *edges, mask.size]).tolist()
        for counts in (rle["counts"], rle["counts"].decode(), runs):
            found = decode_mask({"size": [61, 47], "counts": counts}, 61, 47)
            assert np.array_equal(found, mask)
    for form in (bytes, str):
        rle = coco.encode(np.asfortranarray(np.ones((H, W), np.uint8)))
        counts = rle["counts"] if form is bytes else rle["counts"].decode()
        truth["annotations"][0]["segmentation"] = rle | {"counts": counts}
        kept = read_annotations(truth).records[0].annotations[0]["segmentation"]
        assert json.loads(json.dumps(kept)) == kept
        assert decode_mask(kept, H, W).sum() == H * W


def test_an_rle_needs_no_library_and_a_polygon_names_the_extra(monkeypatch):
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    assert decode_mask({"size": [1, 2], "counts": [1, 1]}, 1, 2).tolist() == [[0, 1]]
    with pytest.raises(ImportError, match="pip install"):
        decode_mask(SQUARE, H, W)


def test_names_of_every_version_find_the_files(folder):
    val, train = "val2017/000000000070.jpg", "train2017/000000000005.jpg"
    names = {
        "COCO_val2014_000000000070.jpg": val,
        "COCO_train2014_000000000005.jpg": train,
        "COCO_val2014_000000000005.jpg": train,  # LVIS val2014 went into train2017, too
        "val2017/000000000070.jpg": val,
        "000000000005.jpg": train,
        "val2017/000000000005.jpg": None,
        "000000000006.jpg": None,
    }
    names["val2017/000000000005.jpg"] = train  # the name decides, not the folder
    found = find_images(names, folder)
    assert found == [path and str(folder / path) for path in names.values()]
    assert find_images(["x.jpg"], [folder, folder / "val2017"]) == [None]
    with pytest.raises(NotADirectoryError, match="nowhere"):
        find_images(["x.jpg"], folder / "nowhere")


def test_the_same_name_in_both_splits_is_refused_or_the_splits_own(tmp_path):
    for split, grey in (("train", 40), ("val", 200)):
        (tmp_path / f"{split}2017").mkdir()
        path = tmp_path / f"{split}2017" / "0.png"
        Image.new("RGB", (W, H), (grey,) * 3).save(path)
        folders = image_folders(tmp_path, f"my_{split}.json")
        assert find_images(["0.png"], folders) == [str(path)]
    with pytest.raises(ValueError, match="0.png is .*train2017.* or .*val2017"):
        find_images(["0.png"], tmp_path)
    (tmp_path / "val").mkdir()  # as the scenes' export has it
    assert image_folders(tmp_path, "val.json")[:2] == [
        tmp_path / "val",
        tmp_path / "val2017",
    ]


def test_an_image_of_lvis_v1_has_only_an_address(truth, folder):
    for row, where in zip(truth["images"], ("val2017", "train2017"), strict=True):
        row.pop("file_name")
        row["coco_url"] = f"http://images.cocodataset.org/{where}/{row['id']:012d}.jpg"
    assert len(InstanceSet(truth, folder)) == 2


def test_missing_files_are_an_error_or_a_counted_warning(truth, folder):
    (folder / "train2017/000000000005.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 .* COCO_train2014_0+5.jpg"):
        InstanceSet(truth, folder)
    with pytest.warns(UserWarning, match="1 of 2 .* skipped"):
        data = InstanceSet(truth, folder, missing="skip")
    assert len(data) == 1 and [r["id"] for r in data.to_lvis()["images"]] == [70]
    (folder / "val2017/000000000070.jpg").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image is left"):
        InstanceSet(truth, folder, missing="skip")


def test_whole_numbers_and_fractions_give_targets_of_one_type(truth, folder):
    whole = InstanceSet(truth, folder)[0][1]
    truth["annotations"][0] |= {"bbox": [2.0, 2.0, 10.0, 10.0], "area": 100}
    target = InstanceSet(truth, folder)[0][1]
    assert {k: v.dtype for k, v in target.items()} == {
        k: v.dtype for k, v in whole.items()
    }
    assert target["area"].dtype == target["boxes"].dtype == torch.float32
    assert torch.equal(target["boxes"], torch.tensor([[2.0, 2, 12, 12]]))


def test_images_without_annotations_are_kept_or_dropped(truth, folder):
    assert len(InstanceSet(truth, folder)) == 2
    dropped = InstanceSet(truth, folder, empty="drop")
    assert [int(target["image_id"]) for _, target in dropped] == [70]
    assert dropped.frequency.total == 2  # f_j divides by all images
    with pytest.raises(ValueError, match="empty must be one of"):
        InstanceSet(truth, folder, empty="maybe")


@pytest.mark.parametrize("fault", ["cut", "empty", "text", "size"])
def test_a_broken_image_is_named(truth, folder, fault):
    data, path = InstanceSet(truth, folder), folder / "train2017/000000000005.jpg"
    check_images(data)
    whole = path.read_bytes()
    if fault == "size":
        Image.new("RGB", (H, W)).save(path)
    else:
        path.write_bytes({"cut": whole[:-150], "empty": b"", "text": b"no"}[fault])
    with pytest.raises((OSError, ValueError), match="000000000005.jpg"):
        data[1]
    with pytest.raises(ValueError, match="1 of 2 image files are unusable.*0+5.jpg"):
        check_images(data)


def test_an_image_is_read_without_a_size_and_never_clipped(tmp_path):
    values = np.full((H, W), 40_000, dtype=np.uint16)
    Image.fromarray((values // 256).astype(np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").unique().tolist() == [40_000 // 256]
    Image.fromarray(values).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match=r"deep.png: .*more than 8 bits"):
        read_image(tmp_path / "deep.png")


def test_a_file_with_boxes_only(truth, folder):
    truth["annotations"][0].pop("segmentation")
    with pytest.raises(ValueError, match="boxes only"):
        InstanceSet(truth, folder)
    assert "masks" not in InstanceSet(truth, folder, masks=False)[0][1]


@pytest.mark.parametrize("shape", [[], [[]], None, [[1, 2]]])
def test_a_box_without_a_shape_is_an_object_where_masks_are_not_asked_for(
    truth, folder, shape
):
    truth["annotations"].append(
        truth["annotations"][0] | {"id": 77, "category_id": 4, "segmentation": shape}
    )
    with pytest.warns(UserWarning, match="skipped empty segmentations: 1"):
        known = read_annotations(truth)
        assert len(InstanceSet(known, folder)[0][1]["boxes"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = InstanceSet(truth, folder, masks=False)
    assert len(data[0][1]["boxes"]) == 2 == len(data.image_classes[0])
    own = data.to_lvis()["annotations"]
    assert {a["id"] for a in own} == {a["id"] for a in truth["annotations"]}
    with pytest.raises(ValueError, match=r"1 boxes? without a mask.*masks=False"):
        InstanceSet(known, folder, masks=False)


def test_selected_items_keep_everything_in_step(truth, folder):
    truth["images"][1] |= {"width": H, "height": W}
    Image.new("RGB", (H, W)).save(folder / "train2017/000000000005.jpg")
    data = InstanceSet(truth, folder).select([1, 0])
    assert [int(target["image_id"]) for _, target in data] == [5, 70]
    assert data.aspect_ratios.tolist() == [H / W, W / H]
    assert data.image_classes == [[], [1]]
    assert [row["id"] for row in data.to_lvis()["images"]] == [5, 70]


def test_a_spawned_worker_reads_the_same(truth, folder):
    data = InstanceSet(truth, folder)
    options = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = DataLoader(data, batch_size=None, **options)
    for (image, target), (own, expected) in zip(loader, data, strict=True):
        assert torch.equal(image, own) and target.keys() == expected.keys()
        assert all(torch.equal(target[key], expected[key]) for key in target)


def test_check_data_tells_whole_broken_missing_and_own_files(truth, folder):
    (folder / "annotations").mkdir()
    text = json.dumps(truth)
    (folder / "annotations/instances_val2017.json").write_text(text)
    (folder / "lvis_v1_val.json").write_text(text[:-9])
    (folder / "mine.json").write_text(text.replace("0070.jpg", "0071.jpg"))
    parts = {part.name: part for part in check_data(folder)}
    assert len(parts) == 9
    assert [n for n, p in parts.items() if p.whole] == ["instances_val2017.json"]
    assert parts["lvis_v1_val.json"].state.startswith("broken: ")
    assert [n for n, p in parts.items() if p.broken] == ["lvis_v1_val.json"]
    assert "missing, from https://" in parts["lvis_v0.5_train.json"].state
    assert parts["val2017"].state == "1 of 5,000 images"
    assert "image files missing: COCO_val2014_0" in parts["mine.json"].state
    (folder / "val2017/000000000070.jpg").write_bytes(b"")
    read = {part.name: part for part in check_data(folder, read_images=True)}
    part = read["instances_val2017.json"]
    assert part.broken and not part.whole and "unusable: " in part.state
    with pytest.raises(NotADirectoryError):
        check_data(folder / "nowhere")


def test_boxes_beside_their_polygons_are_kept_and_counted(truth, folder):
    truth["annotations"][0]["bbox"] = [2, 7.9, 10, 10]
    with pytest.warns(UserWarning, match=f"{BESIDE}: 1"):
        assert InstanceSet(truth, folder)[0][1]["boxes"].tolist()[0][
            3
        ] == pytest.approx(17.9)
    truth["annotations"][0]["bbox"] = [2, 6.9, 10, 10]
    assert not read_quietly(truth).counted


# Real photographs


@pytest.fixture(scope="module")
def lvis():
    """Folder and json of 64 real images."""
    root = os.environ.get("EQL_DATA")
    if not root:
        pytest.skip("EQL_DATA is not set: no real photographs")
    folder = Path(root, "lvis_v0.5_val_64")
    if not folder.is_dir():
        pytest.skip(f"EQL_DATA holds no {folder.name}")
    pytest.importorskip("pycocotools")
    return folder, json.loads((folder / f"{folder.name}.json").read_text())


def test_real_photographs(lvis):
    folder, truth = lvis
    with pytest.warns(UserWarning, match=f"{BESIDE}: 13"):  # and nothing else
        data = InstanceSet(folder / f"{folder.name}.json", folder)
    assert data.annotations.counted == {BESIDE: 13}
    check_images(data)
    assert len(data) == 64 and data.num_classes == 1230
    assert len({j for labels in data.image_classes for j in labels}) == 142
    frequency = ClassFrequency.from_annotations(truth)
    assert torch.equal(data.frequency.counts, frequency.counts)
    found = data.to_lvis()
    assert found["images"] == truth["images"] and len(found["annotations"]) == 674
    rows = {row["id"]: row for row in truth["annotations"]}
    assert all(row | rows[row["id"]] == row for row in found["annotations"])


def test_real_boxes_fit_their_masks(lvis):
    folder, truth = lvis
    data, known = InstanceSet(truth, folder), {c["id"]: c for c in truth["categories"]}
    assert data.names[0] == known[1]["name"] and [*known] == sorted(known)
    count, off = 0, []
    for (image, target), row in zip(data, truth["images"], strict=True):
        assert (
            image.shape[1:]
            == target["masks"].shape[1:]
            == (row["height"], row["width"])
        )
        ids = data.category_ids[target["neg_labels"]].tolist()
        assert ids == row["neg_category_ids"] and int(target["image_id"]) == row["id"]
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            y, x = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
            tight = torch.stack([x[0], y[0], x[-1] + 1, y[-1] + 1])
            off.append(float((box - tight).abs().max()))
        count += len(target["boxes"])
    assert (
        count == 674 and sum(x > 5 for x in off) == 13
    )  # pixels; the file's own fault
    assert sorted(off)[-14] < 3.2  # masks are rounded


def test_check_data_on_real_photographs(lvis):
    parts = {part.name: part for part in check_data(lvis[0])}
    assert parts["lvis_v0.5_val_64.json"].whole
    state = "64 images, 674 annotations, 1,230 categories"
    assert parts["lvis_v0.5_val_64.json"].state == f"{state}; {BESIDE}: 13"
    assert parts["val2017"].state == "64 of 5,000 images"
