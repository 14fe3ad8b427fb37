"""CIFAR-100-LT from real pixels, from torchvision's folder, and over a network."""

import hashlib
import http.server
import os
import pickle
import tarfile
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from eql_repro.images import PACKED, cifar100_lt
from eql_repro.longtail import exponential_counts

REAL = Path(os.environ.get("EQL_DATA", "")) / PACKED
real = pytest.mark.skipif(
    not REAL.is_file(), reason=f"no {PACKED} in the folder that EQL_DATA names"
)


@real
@pytest.mark.parametrize(
    "imbalance, total", [(200, 9_502), (100, 10_847), (50, 12_608)]
)
def test_real_tail_has_the_published_counts(imbalance, total):
    train = cifar100_lt(REAL.parent, imbalance)
    assert len(train) == total
    assert torch.equal(train.counts, exponential_counts(imbalance))
    assert train.images.shape == (total, 3, 32, 32)
    assert train.images.dtype == torch.uint8


@real
def test_real_test_set_is_balanced_and_tails_are_nested():
    test = cifar100_lt(REAL, split="test")
    assert test.counts.tolist() == [100] * 100 and test.names[0] == "apple"
    small, large = (cifar100_lt(REAL, imbalance) for imbalance in (200, 50))
    digests = [
        {hashlib.sha1(image.numpy().tobytes()).digest() for image in s.images}
        for s in (small, large)
    ]
    assert digests[0] <= digests[1]


@real
def test_packed_file_refuses_a_tail_it_does_not_hold():
    with pytest.raises(ValueError, match="imbalance: got 10, expected at least 50"):
        cifar100_lt(REAL, 10)


@pytest.mark.parametrize("content", [b"", b"PK", b"text"])
def test_a_broken_packed_file_is_named(tmp_path, content):
    (tmp_path / PACKED).write_bytes(content)
    with pytest.raises(ValueError, match=f"{PACKED}: broken"):
        cifar100_lt(tmp_path)


@real
def test_a_packed_file_that_was_cut_is_named(tmp_path):
    (tmp_path / PACKED).write_bytes(REAL.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{PACKED}: broken"):
        cifar100_lt(tmp_path)


def archive() -> bytes:
    """A `cifar-100-python.tar.gz` with three images of every class, shade = class."""
    labels = np.arange(300) % 100
    data = np.repeat(labels[:, None], 3072, axis=1).astype(np.uint8)
    files = {
        "train": {"data": data, "fine_labels": labels.tolist()},
        "test": {"data": data[:100], "fine_labels": labels[:100].tolist()},
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            body = pickle.dumps(content)
            info.size = len(body)
            tar.addfile(info, BytesIO(body))
    return out.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """torchvision's CIFAR100, its address and checksums those of a server here."""
    body = archive()
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / CIFAR100.filename).write_bytes(body)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{web.server_address[1]}/{CIFAR100.filename}"
    monkeypatch.setattr(CIFAR100, "url", address)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(body).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": None})
    yield web
    web.shutdown()
    web.server_close()


def test_download_and_tail_of_torchvisions_folder(tmp_path, server):
    train = cifar100_lt(tmp_path / "data", 200, download=True)
    # three images a class, of which the rarest classes may keep two
    assert torch.equal(train.counts, exponential_counts(200).clamp(max=3))
    assert train.counts[99] == 2
    assert torch.equal(train.images[:, 0, 0, 0].long(), train.labels)
    again = cifar100_lt(tmp_path / "data", 200)  # now without the network
    assert torch.equal(again.images, train.images)
    assert cifar100_lt(tmp_path / "data", split="test").names[99] == "class 99"


def test_broken_download_and_absent_data_are_one_clear_error(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(FileNotFoundError, match="root: got .*internet access"):
        cifar100_lt(tmp_path / "data", download=True)
    with pytest.raises(FileNotFoundError, match="download=True"):
        cifar100_lt(tmp_path / "data")


def test_a_download_that_is_not_the_data_is_refused(tmp_path, server, monkeypatch):
    monkeypatch.setattr(CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(FileNotFoundError, match="corrupted"):
        cifar100_lt(tmp_path / "data", download=True)
