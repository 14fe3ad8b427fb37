"""Samplers under real loaders, across processes and with accelerate."""

import hashlib
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eql_repro.longtail import ClassFrequency
from eql_repro.samplers import (
    ClassAwareSampler,
    OrderSampler,
    RepeatFactorSampler,
    batch_of,
    class_aware_order,
    class_aware_weights,
    class_members,
    expected_frequency,
    keyed_generator,
    repeat_factor_order,
    repeat_factors,
    replica_share,
    uniform_order,
)

# 120 images: class 0 in 96, class 2 in 23, class 1 in three, among them class 0's image
# 5; image 119 shows background only
LABELS = [[0]] * 5 + [[0, 1, 1]] + [[0]] * 90 + [[2]] * 21 + [[1, 2]] * 2 + [[3]]
MEMBERS = class_members(LABELS, 3)
FACTORS = repeat_factors(LABELS, 3, threshold=0.3)


def uniform(seed=7, **share):
    return OrderSampler(partial(uniform_order, 120, seed), **share)


def class_aware(seed=7, **share):
    return ClassAwareSampler(MEMBERS, seed=seed, **share)


def repeat_factor(seed=7, **share):
    return RepeatFactorSampler(FACTORS, seed=seed, **share)


MAKERS = {
    "uniform": uniform,
    "class-aware": class_aware,
    "repeat factor": repeat_factor,
}
every_sampler = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def loader_of(sampler, batch=8, workers=0):
    return DataLoader(range(120), batch, sampler=sampler, num_workers=workers)


def images(loader):
    return [batch.tolist() for batch in loader]


@every_sampler
def test_workers_do_not_change_the_order(make):
    sampler = make()
    sampler.set_epoch(3)
    assert images(loader_of(sampler, workers=2)) == images(loader_of(sampler))
    assert [*sampler] == sampler.order(3).tolist()


@every_sampler
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_in_an_epoch_goes_on_as_if_it_had_not(make, workers):
    whole, before, after = make(), make(), make()
    want = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        want += images(loader_of(whole))
    got = []
    for epoch in range(2):
        before.set_epoch(epoch)
        for step, batch in enumerate(loader_of(before, workers=workers), 1):
            got.append(batch.tolist())
            if epoch == 1 and step == 5:  # the workers have asked for more by then
                state = before.state_dict(position=5 * 8)
                break
    after.load_state_dict(state)
    for epoch in range(1, 3):
        after.set_epoch(epoch)
        loader = loader_of(after, workers=workers)
        new = images(loader)
        assert len(loader) == len(new)
        got += new
    assert got == want


@every_sampler
@pytest.mark.parametrize("R", [2, 3, 7])
def test_shares_of_replicas_make_up_the_global_order(make, R):
    shares = [make(num_replicas=R, rank=rank) for rank in range(R)]
    for epoch, position in [(0, 0), (1, 0), (1, 5 * R)]:
        for share in shares:
            share.load_state_dict({"epoch": epoch, "position": position})
        order = make().order(epoch).tolist()
        size = -(-(len(order) - position) // R)
        assert [len(share) for share in shares] == [size] * R
        dealt = [i for turn in zip(*shares, strict=True) for i in turn]
        rest = order[position:]
        assert dealt[: len(rest)] == rest
        assert len(dealt) - len(rest) < R  # a few of the first fill up


def test_a_finished_epoch_of_replicas_saves_and_loads():
    sampler = OrderSampler(partial(uniform_order, 10, 0), num_replicas=4, rank=1)
    state = sampler.state_dict(position=12)  # 4 x 3: two images came twice
    assert state == {"epoch": 0, "position": 10}
    sampler.load_state_dict(state)
    assert [*sampler] == []
    sampler.set_epoch(1)
    assert len(sampler) == 3


DIGEST = """
import hashlib
from eql_repro import samplers as s
labels = [[0]] * 5 + [[0, 1, 1]] + [[0]] * 90 + [[2]] * 21 + [[1, 2]] * 2 + [[3]]
members, factors = s.class_members(labels, 3), s.repeat_factors(labels, 3, 0.3)
for order in (s.uniform_order(120, 7, 4), s.class_aware_order(members, 7, 4, 119),
              s.repeat_factor_order(factors, 7, 4)):
    print(hashlib.sha256(str(order.tolist()).encode()).hexdigest())
"""


def test_another_process_draws_the_same_orders():
    torch.manual_seed(1), torch.rand(5)  # what was drawn here before does not matter
    run = [sys.executable, "-c", DIGEST]
    there = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    orders = [make().order(4) for make in MAKERS.values()]
    here = [hashlib.sha256(str(x.tolist()).encode()).hexdigest() for x in orders]
    assert there.split() == here
    assert len(set(here)) == 3


@every_sampler
def test_epochs_and_seeds_have_other_orders(make):
    sampler, other = make(7), make(8)
    orders = [sampler.order(0), sampler.order(1), other.order(0), other.order(1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@every_sampler
def test_batches_by_iteration_are_the_joined_epochs_in_any_sequence(make):
    order = make().order
    joined = torch.cat([order(epoch) for epoch in range(6)])
    for t in [40, 0, 13, 41, 14]:
        assert torch.equal(batch_of(order, t, 12), joined[12 * t : 12 * t + 12])


def seen_classes(order):
    """How many of the images drawn show each class, counted one by one."""
    counts = [0, 0, 0]
    for i in order.tolist():
        for c in set(LABELS[i]) - {3}:
            counts[c] += 1
    return torch.tensor(counts) / len(order)


def test_what_is_given_may_be_changed_later_and_a_state_is_plain():
    factors = torch.ones(9).double()
    sampler = RepeatFactorSampler(factors)
    factors.fill_(5)
    sampler.set_epoch(np.int64(2))
    assert len([*sampler]) == 9
    state = sampler.state_dict(1)
    assert json.loads(json.dumps(state)) == state == {"epoch": 2, "position": 1}
    sampler.load_state_dict({k: np.int64(v) for k, v in state.items()})
    assert json.dumps(sampler.state_dict(3)) == '{"epoch": 2, "position": 3}'


def test_a_matrix_of_labels_and_images_without_any():
    found = class_members(torch.tensor([[0, 1], [2, 0]]), 3)
    assert [images.tolist() for images in found] == [[0, 1], [0], [1]]
    assert [len(images) for images in class_members([[], []], 3)] == [0, 0, 0]
    assert repeat_factors([[0], [], [0], [1]], 2, 0.5).tolist() == [1, 1, 1, 2**0.5]


def test_whole_numbers_are_taken_for_factors_and_weights():
    order = repeat_factor_order([1, 2, 1], seed=0, epoch=0)
    assert order.sort().values.tolist() == [0, 1, 1, 2]
    assert expected_frequency([1, 3], [[0], [1]], 2).tolist() == [0.25, 0.75]
    assert len(class_aware_order(MEMBERS, 0, 0, length=1)) == 1


def test_class_counts_are_the_expected_ones():
    once = seen_classes(uniform_order(120, 0, 0))
    assert torch.allclose(once, ClassFrequency([96, 3, 23], total=120).f.float())
    assert torch.allclose(
        expected_frequency(torch.ones(120), LABELS, 3).float(), once, atol=1e-6
    )
    n = 400
    aware = torch.cat([class_aware_order(MEMBERS, 0, e, 119) for e in range(n)])
    want = expected_frequency(class_aware_weights(MEMBERS, 120), LABELS, 3)
    assert (seen_classes(aware) - want).abs().max() < 3 / len(aware)
    repeat = torch.cat([repeat_factor_order(FACTORS, 0, e) for e in range(n)])
    want = expected_frequency(FACTORS, LABELS, 3)
    # the turns of 24 images, those of class 1 or 2, are by chance, 1/4 their variance
    bound = 5 * (24 / 4 * n) ** 0.5 / len(repeat)
    assert (seen_classes(repeat) - want).abs().max() < bound


def test_repeat_factors_are_those_of_a_plain_loop():
    shown = [sum(c in classes for classes in LABELS) for c in range(3)]
    for classes, factor in zip(LABELS, FACTORS.tolist(), strict=True):
        each = [(0.3 / (shown[c] / 120)) ** 0.5 for c in classes if c < 3]
        assert factor == pytest.approx(max([1.0, *each]))


def test_an_image_of_two_classes_comes_with_either():
    order = class_aware_order(MEMBERS, 0, 0, length=3 * 3)  # three rounds
    assert {5, 117, 118} <= set(order.tolist())  # class 1 has shown each image


def test_loader_prepared_by_accelerate_resumes():
    accelerate = pytest.importorskip("accelerate")
    prepare = accelerate.data_loader.prepare_data_loader
    whole, again = class_aware(), class_aware()
    want = []
    loader = prepare(loader_of(whole), put_on_device=False)
    for _ in range(3):  # its own count of epochs reaches the sampler
        want.append(images(loader))
    assert whole.epoch == 2
    again.load_state_dict({"epoch": 1, "position": 4 * 8})
    loader = prepare(loader_of(again), put_on_device=False)
    loader.set_epoch(1)
    assert images(loader) == want[1][4:]
    assert images(loader) == want[2]


def test_accelerate_deals_out_the_global_order():
    accelerate = pytest.importorskip("accelerate")
    dealt = []
    for rank in range(2):
        loader = accelerate.data_loader.prepare_data_loader(
            loader_of(uniform(), batch=4),
            num_processes=2,
            process_index=rank,
            put_on_device=False,
        )
        loader = loader.base_dataloader  # its own synchronizes processes: none here
        dealt.append(images(loader))
    order = [i for pair in zip(*dealt, strict=True) for batch in pair for i in batch]
    assert order == uniform_order(120, 7, 0).tolist()


ok = partial(uniform_order, 3, 0)
BAD = {
    "seed": (lambda: keyed_generator(-1, 0, "a"), "seed must be at least 0, got -1"),
    "iteration": (
        lambda: keyed_generator(0, 0.5, "a"),
        "iteration must be a whole number, got 0.5",
    ),
    "no image": (lambda: uniform_order(0, 0, 0), "n must be at least 1, got 0"),
    "epoch": (lambda: uniform_order(3, 0, -2), "epoch must be at least 0, got -2"),
    "batch": (lambda: batch_of(ok, 0, 0), "batch must be at least 1, got 0"),
    "other length": (
        lambda: batch_of(ok, 0, 2, length=4),
        "length must be 3 as in epoch 0, got 4",
    ),
    "empty order": (
        lambda: batch_of(lambda epoch: torch.arange(0), 0, 2),
        "order must not be empty, got no image in epoch 0",
    ),
    "label too large": (
        lambda: class_members([[0], [1, 4]], 3),
        "labels must be in [0, 3], 3 is background, got 4 for image 1",
    ),
    "label below 0": (
        lambda: class_members(torch.tensor([0, -1]), 3),
        "labels must be in [0, 3], 3 is background, got -1 for image 1",
    ),
    "text labels": (
        lambda: class_members(["cat"], 3),
        "labels must hold numbers, got str",
    ),
    "real labels": (
        lambda: class_members([[0.5]], 3),
        "labels must be whole numbers, got torch.float32",
    ),
    "no labels": (
        lambda: class_members([], 3),
        "the number of images in labels must be at least 1, got 0",
    ),
    "empty class": (
        lambda: ClassAwareSampler(class_members([[0], [2]], 4)),
        "members must hold an image of every class, got none of class 1, 3 "
        "(2 of 4 classes)",
    ),
    "lists for members": (
        lambda: ClassAwareSampler([[0], [1]]),
        "members must be tensors int64 [n_c], got [0]",
    ),
    "members of another type": (
        lambda: ClassAwareSampler([torch.zeros(1)]),
        "members must be tensors int64 [n_c], got tensor([0.])",
    ),
    "no class": (
        lambda: ClassAwareSampler([]),
        "the number of classes in members must be at least 1, got 0",
    ),
    "length": (
        lambda: ClassAwareSampler(MEMBERS, length=0),
        "length must be at least 1, got 0",
    ),
    "sampler's seed": (
        lambda: ClassAwareSampler(MEMBERS, seed=-1),
        "seed must be at least 0, got -1",
    ),
    "threshold": (
        lambda: repeat_factors(LABELS, 3, 0),
        "threshold must be above 0, got 0",
    ),
    "frequency's type": (
        lambda: repeat_factors(LABELS, 3, frequency=torch.ones(3)),
        "frequency must be a ClassFrequency, got Tensor",
    ),
    "frequency's length": (
        lambda: repeat_factors(LABELS, 3, frequency=ClassFrequency([1, 1])),
        "frequency must have 3 classes, got 2",
    ),
    "frequency 0": (
        lambda: repeat_factors(LABELS, 3, frequency=ClassFrequency([1, 0, 1])),
        "frequency must be above 0, got 0 for class 1",
    ),
    "factor below 1": (
        lambda: RepeatFactorSampler(torch.tensor([1, 0.5])),
        "factors must be finite and at least 1, got 0.5",
    ),
    "factor nan": (
        lambda: RepeatFactorSampler(torch.tensor([float("nan")])),
        "factors must be finite and at least 1, got nan",
    ),
    "factors' shape": (
        lambda: RepeatFactorSampler(torch.ones(2, 2)),
        "factors must be [N], N at least 1, got [2, 2]",
    ),
    "members for factors": (
        lambda: RepeatFactorSampler(MEMBERS),
        "factors must hold numbers, got list",
    ),
    "weights' length": (
        lambda: expected_frequency(torch.ones(4), LABELS, 3),
        "weights must be [120] like labels, got [4]",
    ),
    "weight below 0": (
        lambda: expected_frequency(-torch.ones(120), LABELS, 3),
        "weights must be finite, at least 0 and not all 0",
    ),
    "too few images": (
        lambda: class_aware_weights(MEMBERS, 9),
        "images must be at least 119, got 9",
    ),
    "multi-hot": (
        lambda: class_members(torch.eye(3, dtype=torch.int64), 3),
        "labels must be class ids, got a matrix [3, 3] of 0 and 1; of a multi-hot row "
        "take row.nonzero()[:, 0]",
    ),
    "multi-hot rows": (
        lambda: class_members([[0, 1, 1], [1, 0, 0]], 3),
        "labels must be class ids, got a matrix [2, 3] of 0 and 1; of a multi-hot row "
        "take row.nonzero()[:, 0]",
    ),
    "num_replicas": (
        lambda: OrderSampler(ok, num_replicas=0),
        "num_replicas must be at least 1, got 0",
    ),
    "rank": (
        lambda: OrderSampler(ok, num_replicas=2, rank=2),
        "rank must be below num_replicas=2, got 2",
    ),
    "position": (
        lambda: replica_share(torch.arange(3), 1, 0, 4),
        "position must be at most 3, got 4",
    ),
    "order for a function": (
        lambda: OrderSampler(torch.arange(3)),
        "order must be a function of the epoch, got Tensor",
    ),
    "set_epoch": (
        lambda: OrderSampler(ok).set_epoch(1.5),
        "epoch must be a whole number, got 1.5",
    ),
    "half a state": (
        lambda: OrderSampler(ok).load_state_dict({"epoch": 0}),
        "state must hold epoch and position, got ['epoch']",
    ),
    "state of a longer order": (
        lambda: OrderSampler(ok).load_state_dict({"epoch": 0, "position": 4}),
        "position must be at most 3, got 4",
    ),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message
