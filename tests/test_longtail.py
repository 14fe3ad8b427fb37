"""What chapter 01 has no room for: files on disk, odd inputs, and every error."""

import json
import math
import warnings
from importlib import resources

import numpy as np
import pytest
import torch

from eql_repro import ClassFrequency
from eql_repro.counts import image_counts, require
from eql_repro.longtail import exponential_counts, tail_of

COCO = {
    "images": [{"id": 10}, {"id": 20}, {"id": 30}],
    "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "ant"}],
    "annotations": [
        {"image_id": 10, "category_id": 9, "iscrowd": 0},
        {"image_id": 10, "category_id": 9, "iscrowd": 1},
        {"image_id": 20, "category_id": 9},
    ],
}


def without(key):
    return {k: v for k, v in COCO.items() if k != key}


def test_count_tables_are_package_data():
    names = {p.name for p in (resources.files("eql_repro") / "data").iterdir()}
    assert {"lvis_v0.5.csv", "lvis_v1.csv", "imagenet_lt.csv"} <= names


@pytest.mark.parametrize(
    ("version", "images", "total", "sizes"),
    [
        ("v0.5", "all", 57_263, [454, 461, 315]),
        ("v0.5", "annotated", 56_740, [454, 461, 315]),
        ("v1", "all", 100_170, [337, 461, 405]),
        ("v1", "annotated", 99_388, [337, 461, 405]),
    ],
)
def test_lvis(version, images, total, sizes):
    frequency = ClassFrequency.lvis(version, images=images)
    assert frequency.total == total
    assert [int(g.sum()) for g in frequency.groups().values()] == sizes
    assert len(frequency.names) == len(frequency) == sum(sizes)
    assert frequency.f.dtype == torch.float64 and frequency.counts.dtype == torch.int64
    assert torch.equal(frequency.f, frequency.counts.double() / total)


def test_a_series_of_pandas_keeps_its_classes():
    pd = pytest.importorskip("pandas")
    labels = pd.Series([0, 1, 1, 2, 1])
    with pytest.raises(ValueError, match=r"classes 0, 1, …, got \[1, 0, 2\]; reindex"):
        ClassFrequency(labels.value_counts())
    counted = labels.value_counts().reindex(range(4), fill_value=0)
    assert ClassFrequency(counted).counts.tolist() == [1, 3, 1, 0]
    named = pd.Series({"cat": 5, "ant": 7})
    assert ClassFrequency(named).counts.tolist() == [5, 7]
    part = ClassFrequency.from_labels(labels[labels > 0])
    assert part.counts.tolist() == [0, 3, 1]


def test_an_empty_tail_names_the_smallest_ratio_above_0():
    with pytest.warns(UserWarning, match="that is not empty has 0.04"):
        assert ClassFrequency([0, 40, 60, 900]).lambda_for(tail_ratio=0.01) == 0


def test_from_annotations_reads_a_path_and_a_dict(tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(COCO))
    for source in (COCO, path, str(path)):
        frequency = ClassFrequency.from_annotations(source)
        assert frequency.names == ("ant", "cat")
        assert frequency.counts.tolist() == [0, 2] and frequency.total == 3
        annotated = ClassFrequency.from_annotations(source, images="annotated")
        assert annotated.counts.tolist() == [0, 2] and annotated.total == 2
        assert image_counts(source) == {2: 0, 9: 2}
    assert image_counts(COCO | {"annotations": []}) == {2: 0, 9: 0}


WRONG_ROWS = {
    "categories: rows without a whole 'id': {}": {"categories": [{}]},
    "categories: rows without a whole 'id': {'id': 'b'}": {
        "categories": [{"id": 1}, {"id": "b"}]
    },
    "images: rows without a whole 'id': 1, 2": {"images": [1, 2]},
    "images: ids that stand there twice: 5": {"images": [{"id": 5}] * 2},
    "annotations: rows without 'image_id': {'category_id': 9}": {
        "annotations": [{"category_id": 9}]
    },
    "annotations: rows without 'category_id': {'image_id': 10}": {
        "annotations": [{"image_id": 10}]
    },
    "annotations: rows without 'image_id': [10, 9]": {"annotations": [[10, 9]]},
    "image_ids that are not listed: [10]": {
        "annotations": [{"image_id": [10], "category_id": 9}]
    },
    "category_ids that are not listed: 8": {
        "annotations": [{"image_id": 10, "category_id": 8}]
    },
}


@pytest.mark.parametrize("message", WRONG_ROWS)
@pytest.mark.parametrize("read", [image_counts, ClassFrequency.from_annotations])
def test_a_wrong_row_is_named_and_its_file_once(tmp_path, message, read):
    file, source = tmp_path / "mine.json", COCO | WRONG_ROWS[message]
    file.write_text(json.dumps(source))
    for given in (source, file):
        with pytest.raises(ValueError) as error:
            read(given)
        assert message in str(error.value)
    assert str(error.value).count(str(file)) == 1


@pytest.mark.parametrize("text", ["[]", '"x.json"', "{", "{}"])
def test_a_file_that_is_no_annotation_file_is_named_once(tmp_path, text):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        image_counts(file)
    assert str(error.value).startswith(f"{file}: not ")
    assert str(error.value).count(str(file)) == 1


@pytest.mark.parametrize("counts", [[3, 1], (3, 1), np.array([3, 1]), np.ones(2)])
def test_counts_may_be_any_sequence(counts):
    assert ClassFrequency(counts, total=4).counts.tolist() == [int(c) for c in counts]


def test_the_cut_is_strict_and_exact_at_awkward_totals():
    for total in (3, 10, 1000, 57_263, 99_991, 10**9):
        counts = torch.arange(min(total, 2000))
        frequency = ClassFrequency(counts, total=total)
        for n in (0, 1, 7, 49, 1999):
            exactly = n / total
            assert torch.equal(frequency.tail(exactly), counts < n)
            assert torch.equal(
                frequency.tail(frequency.lambda_for(count=n)), counts <= n
            )


def test_lambda_for_a_ratio_is_the_nearest_cut():
    frequency = ClassFrequency.lvis("v0.5")
    every = [frequency.tail_ratio(frequency.lambda_for(count=n)) for n in range(1200)]
    for r in (0, 0.0093, 0.0908, 0.5, 1):
        found = frequency.tail_ratio(frequency.lambda_for(tail_ratio=r))
        assert abs(found - r) == min(abs(x - r) for x in [0, *every])
    cut = frequency.tail(frequency.lambda_for(tail_ratio=0.0908))
    assert torch.equal(cut, frequency.counts <= 100)


def test_a_frequency_tensor_is_compared_in_its_own_type():
    for dtype in (torch.float64, torch.float32, torch.float16):
        f = torch.tensor([9 / 1000, 10 / 1000, 11 / 1000], dtype=dtype)
        assert tail_of(f, 0.01).tolist() == [True, False, False]


def test_a_class_that_no_image_shows():
    frequency = ClassFrequency([0, 0], total=5)
    assert frequency.tail_ratio(1) == 0 and not frequency.tail(0).any()
    assert frequency.tail(1e-9).all() and "ClassFrequency" in repr(frequency)


def test_the_tables_can_be_read():
    lvis, cifar = ClassFrequency.lvis(), ClassFrequency.cifar100_lt(200)
    assert "rare" in repr(lvis) and "57,263" in repr(lvis) and "0.93%" in repr(lvis)
    assert "few" in repr(cifar) and cifar._repr_html_().count("<tr>") == 4
    assert cifar.total == 9502 == exponential_counts(200).sum()


ERRORS = {
    "empty": (lambda: ClassFrequency([]), ValueError, "counts"),
    "negative": (lambda: ClassFrequency([1, -2]), ValueError, "counts.*-2"),
    "nan": (lambda: ClassFrequency([1, math.nan]), ValueError, "counts.*nan"),
    "infinite": (lambda: ClassFrequency([1, math.inf]), ValueError, "counts.*inf"),
    "fraction": (lambda: ClassFrequency([1, 0.5]), ValueError, "counts.*0.5"),
    "matrix": (lambda: ClassFrequency([[1]]), ValueError, "counts"),
    "text": (lambda: ClassFrequency(["a"]), TypeError, "counts"),
    "mask": (lambda: ClassFrequency([True]), TypeError, "counts"),
    "above": (lambda: ClassFrequency([5, 9], 7), ValueError, "counts.*7.*9"),
    "none seen": (lambda: ClassFrequency([0, 0]), ValueError, "total"),
    "total": (lambda: ClassFrequency([1], math.nan), ValueError, "total"),
    "half total": (lambda: ClassFrequency([1], 2.5), ValueError, "total"),
    "names": (lambda: ClassFrequency([1], names=["a", "b"]), ValueError, "names"),
    "lambda": (lambda: ClassFrequency([1]).tail(-1), ValueError, "lambda_.*-1"),
    "lambda nan": (lambda: ClassFrequency([1]).tail(math.nan), ValueError, "lambda_"),
    "lambda text": (lambda: ClassFrequency([1]).tail("1"), TypeError, "lambda_"),
    "groups": (lambda: ClassFrequency([1]).groups("x"), ValueError, "kind"),
    "version": (lambda: ClassFrequency.lvis("v2"), ValueError, "version.*v2"),
    "images": (lambda: ClassFrequency.lvis(images="x"), ValueError, "images"),
    "both": (
        lambda: ClassFrequency([1]).lambda_for(count=1, tail_ratio=0.1),
        ValueError,
        "count=",
    ),
    "neither": (lambda: ClassFrequency([1]).lambda_for(), ValueError, "count="),
    "count": (lambda: ClassFrequency([1]).lambda_for(count=-1), ValueError, "count"),
    "half": (lambda: ClassFrequency([1]).lambda_for(count=0.5), ValueError, "count"),
    "per cent": (
        lambda: ClassFrequency([1]).lambda_for(tail_ratio=9.08),
        ValueError,
        "tail_ratio.*9.08",
    ),
    "imbalance": (lambda: exponential_counts(0.5), ValueError, "imbalance"),
    "label": (lambda: ClassFrequency.from_labels([0, -1]), ValueError, "labels"),
    "label C": (lambda: ClassFrequency.from_labels([0, 3], 3), ValueError, "labels"),
    "no images": (
        lambda: ClassFrequency.from_annotations(without("images")),
        ValueError,
        "images",
    ),
    "empty images": (
        lambda: ClassFrequency.from_annotations(COCO | {"images": []}),
        ValueError,
        "images",
    ),
    "no categories": (
        lambda: ClassFrequency.from_annotations(without("categories")),
        ValueError,
        "categories",
    ),
    "no annotations": (
        lambda: ClassFrequency.from_annotations(without("annotations")),
        ValueError,
        "annotations",
    ),
    "stranger": (
        lambda: image_counts(COCO | {"categories": [{"id": 2}]}),
        ValueError,
        "category_ids that are not listed: 9",
    ),
    "stranger image": (
        lambda: image_counts(COCO | {"images": COCO["images"][:1]}),
        ValueError,
        "image_ids that are not listed: 20",
    ),
    "twice": (
        lambda: image_counts(COCO | {"images": COCO["images"] * 2}),
        ValueError,
        "images: ids that stand there twice",
    ),
    "a list": (lambda: ClassFrequency.from_annotations([]), TypeError, "source.*list"),
    "counts as f": (lambda: tail_of(torch.tensor([3]), 1), TypeError, "frequency"),
    "f above 1": (
        lambda: tail_of(torch.tensor([3.0]), 1),
        ValueError,
        "3 to 3.*counts",
    ),
    "one f above 1": (
        lambda: tail_of(torch.tensor([0.5, 3.0]), 1),
        ValueError,
        "0.5 to 3.*counts",
    ),
    "one weight above 1": (
        lambda: tail_of(torch.ones(2), 1, lambda f, _: torch.tensor([0.5, 3.0])),
        ValueError,
        "threshold",
    ),
    "number of classes as text": (
        lambda: ClassFrequency.from_labels([0, 1], "3"),
        TypeError,
        "num_classes",
    ),
    "half a class": (
        lambda: ClassFrequency.from_labels([0, 1], 2.5),
        ValueError,
        "num_classes",
    ),
    "f nan": (lambda: tail_of(torch.tensor([math.nan]), 1), ValueError, "frequency"),
    "threshold": (lambda: tail_of(torch.ones(1), 1, "x"), ValueError, "threshold"),
    "shape": (
        lambda: tail_of(torch.ones(2), 1, lambda f, _: f[:1]),
        ValueError,
        "threshold",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int16"])
def test_counts_and_labels_may_be_of_any_whole_kind(kind):
    counts = ClassFrequency(np.array([3, 1], dtype=kind)).counts
    assert counts.tolist() == [3, 1] and counts.dtype == torch.int64
    assert ClassFrequency.from_labels(np.array([0, 1], dtype=kind), 3).counts[2] == 0


def test_counts_are_a_copy():
    for counts in (torch.tensor([5, 1]), np.array([5, 1])):
        frequency = ClassFrequency(counts)
        counts[:] = 0
        assert frequency.counts.tolist() == [5, 1]


@pytest.mark.parametrize("imbalance", [2, 3, 49, 98, 103, 200])
def test_the_last_class_has_what_the_imbalance_says(imbalance):
    assert exponential_counts(imbalance, 2, imbalance).tolist() == [imbalance, 1]


def test_a_tail_that_cannot_be_meant_is_warned_of():
    short = ClassFrequency([100, 50, 20])
    with pytest.warns(UserWarning, match="tail_ratio=0.05: empty tail.* has 0.118"):
        assert short.lambda_for(tail_ratio=0.05) == 0
    with pytest.warns(UserWarning, match="lambda_=100: frequencies end at 1"):
        tail_of(short, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert short.lambda_for(tail_ratio=0.1) > 0
        tail_of(short, 1)


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r'pip install "eql_repro\[run\]"'):
        require("no_such_module_here.part")
    assert require("json") is json


def test_what_an_installed_module_lacks_is_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here") as caught:
        require("broken_module")
    assert "pip install" not in str(caught.value)
