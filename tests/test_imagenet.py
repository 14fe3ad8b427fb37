"""ImageNet-LT by its lists, on a made tree of pictures."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eql_repro.images import PHOTO_STEPS, imagenet_lt, uniforms
from eql_repro.recipes import RECIPES, table9

CLASSES, EACH = 5, {"train": (6, 4, 3, 2, 1), "val": (1,) * 5, "test": (2,) * 5}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """ImageNet's folders and ImageNet-LT's lists, a few pictures of other sizes."""
    root, chance = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, counts in EACH.items():
        lines, inside = [], "val" if split == "test" else "train"
        for label, count in enumerate(counts):
            for i in range(count):
                name = f"{inside}/n{label:08d}/{split} {i}.JPEG"  # a blank in the name
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (60 + 10 * i, 80, 3) if label else (70, 50)  # colour or grey
                pixels = chance.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                lines.append(f"{name} {label}")
        (root / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_each_split_comes_from_its_own_list(tree):
    splits = {s: imagenet_lt(tree, s, num_classes=CLASSES) for s in EACH}
    for split, images in splits.items():
        assert images.counts.tolist() == list(EACH[split])
        inside = "val" if split == "test" else "train"
        assert all(str(tree / inside) in path for path in images.images)
    paths = [set(images.images) for images in splits.values()]
    assert not (paths[0] & paths[1] or paths[0] & paths[2] or paths[1] & paths[2])


def test_photographs_have_one_size_and_three_channels(tree):
    images = imagenet_lt(tree, "test", num_classes=CLASSES)
    batch = images.batch(torch.arange(len(images)))
    assert batch.shape == (10, 3, 224, 224) and batch.dtype == torch.uint8


def test_augmentation_is_a_function_of_its_row(tree):
    images = imagenet_lt(tree, num_classes=CLASSES)
    index, u = torch.tensor([3, 3]), uniforms(0, 0, 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = images.batch(index, u, PHOTO_STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(images.batch(index.flip(0), u, PHOTO_STEPS), first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    "line, error, says",
    [
        ("train/none.JPEG 1", FileNotFoundError, "1 are missing, such as"),
        ("train/x.JPEG 5", ValueError, "line 17: got .* label from 0 to 4"),
        ("train/x.JPEG", ValueError, "line 17"),
        ("train/x.JPEG -1", ValueError, "line 17"),
        ("train/x.JPEG \N{SUPERSCRIPT TWO}", ValueError, "line 17"),
    ],
)
def test_a_bad_line_is_one_clear_error(tree, tmp_path, line, error, says):
    text = (tree / "ImageNet_LT_train.txt").read_text() + line + "\n"
    (tmp_path / "ImageNet_LT_train.txt").write_text(text)
    with pytest.raises(error, match=says):
        imagenet_lt(tree, num_classes=CLASSES, lists=tmp_path)


def test_a_broken_photograph_is_named(tree, tmp_path):
    (tmp_path / "broken.JPEG").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "ImageNet_LT_val.txt").write_text("broken.JPEG 0\n")
    images = imagenet_lt(tmp_path, "val", num_classes=1)
    with pytest.raises(OSError, match=r"broken\.JPEG cannot be read as an image"):
        images.batch(torch.tensor([0]))


def test_a_photograph_of_more_than_8_bits_is_refused(tmp_path):
    deep = np.full((300, 300), 40_000, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (tmp_path / "ImageNet_LT_val.txt").write_text("deep.png 0\n")
    images = imagenet_lt(tmp_path, "val", num_classes=1)
    with pytest.raises(OSError, match=r"deep\.png cannot .*more than 8 bits"):
        images.batch(torch.tensor([0]))


def test_the_rows_of_table_9_are_the_papers():
    softmax, *rest = table9()
    assert (softmax.iterations, softmax.batch, softmax.lr) == (12_000, 1024, 0.4)
    assert softmax.milestones == (3_400, 6_800, 10_200) and softmax.warmup == 500
    assert all(r.lambda_ == 4.3e-4 and r.loss == "seql" for r in rest)
    assert all(RECIPES[r.name] == r for r in table9())


@pytest.mark.parametrize("name", ["imagenetlt_softmax", "imagenetlt_seql_g90"])
def test_eql_run_trains_two_iterations(tree, tmp_path, name):
    few = dict(iterations=2, batch=4, num_classes=CLASSES, warmup=0, milestones=())
    recipe = replace(RECIPES[name], name="two", **few)
    text = f"from eql_repro.recipe import Recipe\ntwo = {recipe!r}\n"
    (tmp_path / "my.py").write_text(text)
    command = [sys.executable, "-m", "eql_repro", "run", f"{tmp_path}/my.py:two"]
    command += ["--out", str(tmp_path), "--data", str(tree), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "two-s0" / "record.json").read_text())
    assert record["iterations"] == 2 and 0 <= record["metrics"]["top1"] <= 1
    assert len(record["per_class"]["negative_gradient"]) == CLASSES


def test_a_photograph_leaves_the_generators_of_gpus_alone(tree, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seen.append)
    imagenet_lt(tree, "val", num_classes=CLASSES).batch(torch.tensor([0]))
    assert not seen
