"""What a notebook cannot hold: killed, interrupted and parallel runs."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from two_processes import start_pair

from eql_repro import training
from eql_repro.classify import DATA_SETS, load_data
from eql_repro.provenance import load_weights, sole_use, write_file
from eql_repro.recipe import Recipe
from eql_repro.training import Interrupted, Options, run_folder, train

TINY = Recipe(
    "tiny", data="crops", num_classes=10, imbalance=20, network="resnet8", loss="seql",
    lambda_=0.05, gamma=0.9, iterations=80, batch=16, lr=0.05, warmup=4,
    milestones=(40,),
)  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["eql_repro.training", "eql_repro.crops", "accelerate"])


def child(out: str, workers: int, die_in_save: int = 0) -> None:
    """Train TINY with a checkpoint every 2 iterations; die in the middle of a save."""
    multiprocessing.set_start_method("fork", force=True)  # workers die with the run
    save, count = torch.save, 0

    def cut(state, path):
        nonlocal count
        save(state, path)
        count += 1
        if count == die_in_save:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = cut
    train([(TINY, 0)], out, Options(workers=workers, checkpoint_every=2))


def iteration(folder: Path) -> int:
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["iteration"] if path.is_file() else 0


def weights(folder: Path) -> dict:
    return torch.load(folder / "weights.pt", weights_only=True)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """TINY, uninterrupted, without workers."""
    return train([(TINY, 0)], tmp_path_factory.mktemp("whole"))[0]


def test_ten_kills_leave_no_trace(tmp_path, whole):
    chance, folder = random.Random(0), run_folder(tmp_path, TINY, 0)
    for kill in range(10):
        before, in_save = iteration(folder), kill == 4
        process = CONTEXT.Process(target=child, args=(str(tmp_path), 2, 2 * in_save))
        process.start()
        if in_save:
            process.join(120)
            assert [*folder.glob("checkpoint.pt.*.part")], "not killed in a save"
        else:
            target = before + chance.randint(1, 8)
            while iteration(folder) < target:
                assert process.is_alive(), "ended before the kill"
                time.sleep(0.005)
            time.sleep(chance.random() * 0.02)
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert before < iteration(folder) < TINY.iterations, "no partial run was left"
        assert not (folder / "record.json").exists()
    train([(TINY, 0)], tmp_path, Options(workers=2))
    assert equal(weights(folder), weights(whole))
    record = json.loads((folder / "record.json").read_text())
    expected = json.loads((whole / "record.json").read_text())
    for key in ("metrics", "per_class", "curves", "source", "iterations"):
        assert record[key] == expected[key], key


def test_other_seed_gives_other_weights(tmp_path, whole):
    other = train([(TINY, 1)], tmp_path)[0]
    assert not equal(weights(other), weights(whole))


def test_runs_side_by_side_equal_runs_alone(tmp_path, whole):
    softmax = replace(TINY, name="tiny_softmax", loss="softmax")
    folders = train([(TINY, 0), (softmax, 0), (TINY, 1)], tmp_path)
    assert equal(weights(folders[0]), weights(whole))
    assert not equal(weights(folders[1]), weights(whole))


class StopAt30:
    """A progress bar that asks the run to stop after its iteration 30."""

    images = 0

    def update(self, n):
        self.images += n
        if self.images == 30 * TINY.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def test_interrupt_leaves_a_resumable_run(tmp_path, whole):
    with pytest.raises(Interrupted, match="iteration 30"):
        train([(TINY, 0)], tmp_path, bar=StopAt30())
    folder = run_folder(tmp_path, TINY, 0)
    assert iteration(folder) == 30
    train([(TINY, 0)], tmp_path)
    assert equal(weights(folder), weights(whole))


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path, whole):
    with pytest.raises(Interrupted):
        train([(TINY, 0)], tmp_path, bar=StopAt30())
    start = run_folder(tmp_path, TINY, 0) / "run.json"
    said = json.loads(start.read_text())
    for change in ({"total": 7}, {"counts": said["counts"][::-1]}, {"names": ["a"]}):
        start.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=f"data: an entry of {[*change][0]} was "):
            train([(TINY, 0)], tmp_path)
    assert json.loads(start.read_text())["names"] == ["a"]
    train([(TINY, 0)], tmp_path, force=True)
    assert equal(weights(start.parent), weights(whole))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lr": "1e-3"}, "a finite number"),
        ({"lr": float("nan")}, "a finite number"),
        ({"lr": True}, "a finite number"),
        ({"lr": -0.1}, "at least 0"),
        ({"iterations": 30.0}, "a whole number"),
        ({"nesterov": 1}, "True or False"),
        ({"network": None}, "text"),
        ({"repeat_threshold": 0.0}, "above 0"),
        ({"reweight_from": 12}, "0, but for ldam"),
        ({"loss": "ldam", "reweight_from": 80}, "less than iterations"),
    ],
)
def test_a_recipe_names_the_field_that_cannot_be_trained(change, expected):
    field = [*change][-1]
    with pytest.raises(ValueError, match=f"^{field} of recipe 'tiny': .*{expected}"):
        replace(TINY, **change)
    assert replace(TINY, lr=1, loss="ldam", reweight_from=79).reweight_from == 79


@pytest.mark.parametrize(
    "change", [{"background": 4}, {"augment": ("flips",)}, {"augment": ("cutout",)}]
)
def test_a_detector_has_no_augmentation_but_flips(change):
    detector = {"data": "instances", "augment": ("flip",), "loss": "sigmoid"}
    assert replace(TINY, **detector).data == "instances"
    with pytest.raises(ValueError, match=f"^{[*change][0]} of recipe .*detector"):
        replace(TINY, **detector | change)


def test_a_finished_run_stays_beside_an_unfinished_one(tmp_path, whole):
    shutil.copytree(whole, tmp_path / whole.name)
    before = (whole / "record.json").read_text()
    small = replace(TINY, name="small", iterations=2, warmup=0, milestones=())
    train([(small, 0)], tmp_path)
    folders = train([(small, 0), (small, 1)], tmp_path)
    assert [(f / "record.json").is_file() for f in folders] == [True, True]
    assert (tmp_path / whole.name / "record.json").read_text() == before


def test_force_discards_nothing_before_the_data_is_there(tmp_path, monkeypatch, whole):
    folder = shutil.copytree(whole, tmp_path / "cifar-s0")
    monkeypatch.delenv("EQL_DATA", raising=False)
    cifar = replace(TINY, name="cifar", data="cifar100_lt", num_classes=100)
    with pytest.raises(ValueError, match="EQL_DATA"):
        train([(cifar, 0)], tmp_path, force=True)
    assert (folder / "record.json").is_file() and (folder / "weights.pt").is_file()
    (folder / "checkpoint-900.pt").touch()  # of a longer run that is no more
    short = replace(TINY, name="cifar", iterations=2, warmup=0, milestones=())
    train([(short, 0)], tmp_path, force=True)
    assert json.loads((folder / "record.json").read_text())["iterations"] == 2
    assert not [*folder.glob("checkpoint*")]


@pytest.mark.parametrize(
    "change",
    [
        {"network": "resnet9"},
        {"threshold": "steep"},
        {"loss_options": (("sharpness", 3),)},
        {"augment": ("mirror",)},
    ],
)
def test_force_discards_nothing_where_the_new_run_cannot_be_built(
    tmp_path, whole, change
):
    folder = shutil.copytree(whole, tmp_path / whole.name)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises((ValueError, TypeError)):
        train([(replace(TINY, **change), 0)], tmp_path, force=True)
    assert sorted(p.name for p in folder.iterdir()) == before
    assert "record.json" in before and "weights.pt" in before


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), 1e300, -1])
def test_minutes_that_no_clock_can_wait_are_refused(minutes):
    with pytest.raises(ValueError, match="minutes: got"):
        Options(minutes=minutes)


def test_a_full_disk_is_an_error_of_the_file_and_the_old_one_stays(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_text("old")

    def full(part):
        part.write_text("ne")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match=r"weights.pt: cannot be written \(Pytorch"):
        write_file(path, full)
    assert path.read_text() == "old" and len([*tmp_path.iterdir()]) == 1


def test_weights_are_read_on_the_device_of_a_process_and_broken_ones_named(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(torch.arange(9_000), path)
    here = torch.device("cpu", 0)  # as accelerate says where there are several
    assert load_weights(path, here).equal(torch.arange(9_000))
    whole = path.read_bytes()
    for size in range(0, len(whole), 3_000):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="weights.pt: broken"):
            load_weights(path)
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.pt")


def test_a_failed_evaluation_loses_no_step(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    small = replace(TINY, name="small", iterations=3, warmup=0, milestones=())
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", fail)
        with pytest.raises(OSError, match="no space"):
            train([(small, 0)], tmp_path)
    assert iteration(run_folder(tmp_path, small, 0)) == 3
    train([(small, 0)], tmp_path)
    assert (tmp_path / "small-s0" / "record.json").is_file()


def test_a_folder_in_use_is_refused(tmp_path):
    with sole_use([run_folder(tmp_path, TINY, 0)]):
        with pytest.raises(BlockingIOError, match="tiny-s0 is in use"):
            train([(TINY, 0)], tmp_path)


def test_other_classes_than_the_data_has_are_refused(monkeypatch):
    data = (SimpleNamespace(num_classes=100),)
    monkeypatch.setitem(DATA_SETS, "crops", lambda *_: data)
    with pytest.raises(ValueError, match="num_classes of recipe 'tiny': got 7, .* 100"):
        load_data(replace(TINY, num_classes=7))


def test_a_worker_leaves_signals_to_the_main_process():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        training._ignore_signals(0)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_finished_run_is_not_overwritten(tmp_path, whole):
    before = (whole / "record.json").read_text()
    with pytest.raises(FileExistsError, match="finished run"):
        train([(TINY, 0)], whole.parent)
    assert (whole / "record.json").read_text() == before


def test_changed_recipe_in_the_same_folder_is_refused(tmp_path):
    folder = run_folder(tmp_path, TINY, 0)
    folder.mkdir()
    state = {"recipe": TINY.__dict__ | {"lr": 0.1}, "seed": 0}
    (folder / "run.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="another lr: 0.1, now 0.05"):
        train([(TINY, 0)], tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"recipe": 1}'])
def test_a_broken_start_is_named(tmp_path, text):
    folder = run_folder(tmp_path, TINY, 0)
    folder.mkdir()
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json is broken; --force replaces it"):
        train([(TINY, 0)], tmp_path)


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    wild = replace(TINY, name="wild", lr=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="wild seed 0: the loss is"):
        train([(wild, 0)], tmp_path, Options(checkpoint_every=5))
    state = torch.load(run_folder(tmp_path, wild, 0) / "checkpoint.pt")
    assert state["iteration"] == 5


def distributed(rank: int, out: str) -> None:
    train([(replace(TINY, name="two", iterations=8, milestones=()), 0)], out)


def test_two_processes_split_the_batch(tmp_path):
    pair = start_pair(CONTEXT, distributed, str(tmp_path))
    for process in pair:
        process.join(180)
    assert [process.exitcode for process in pair] == [0, 0]
    record = json.loads((tmp_path / "two-s0" / "record.json").read_text())
    assert record["iterations"] == 8 and record["metrics"]["top1"] > 0


def test_data_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("EQL_DATA", raising=False)
    cifar = replace(TINY, name="cifar", data="cifar100_lt", num_classes=100)
    with pytest.raises(ValueError, match="EQL_DATA"):
        train([(cifar, 0)], tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar-100-python"):
        load_data(cifar, tmp_path)


def test_tensorboard_gets_loss_rate_and_accuracy(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    board = replace(TINY, name="board", iterations=20, milestones=())
    train([(board, 0)], tmp_path, Options(tensorboard=True))
    (file,) = tmp_path.rglob("events.*")
    log = events.EventAccumulator(str(file))
    log.Reload()
    assert set(log.Tags()["scalars"]) == {
        f"{k}/board-s0" for k in ("loss", "lr", "top1")
    }


def test_peak_memory_is_counted_from_the_start_of_these_runs(monkeypatch):
    seen, place = [], {"device": torch.device("cuda"), "process_index": 0}
    accelerator = SimpleNamespace(**place, num_processes=1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    lane = SimpleNamespace(recipe=TINY, seed=0, iteration=TINY.iterations)
    lane.task = SimpleNamespace(batches=lambda *share: [])
    training.run_lanes([lane], accelerator, Options(), None)
    assert seen == [accelerator.device]
