"""What chapter 02 has no room for: brute force, processes, precision and errors."""

import copy
import io
import os
from contextlib import nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_losses import NoSync
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eql_repro import ClassFrequency, EqualizationLoss
from eql_repro.gradients import GradientMeter

C, D, N = 5, 4, 12


def batch(dtype=torch.float64, seed=0, n=N, background=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, C + background, (n,), generator=g)


def one_hot(labels):
    return F.one_hot(labels, C + 1)[:, :C].double()


def sigmoid(z, labels, reduction="sum"):
    y = one_hot(labels).to(z.dtype)
    loss = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    return loss.sum() if reduction == "sum" else loss.mean()


def softmax(z, labels, reduction="sum"):
    return F.cross_entropy(z, labels, reduction=reduction, ignore_index=C)


def eql(z, labels, reduction="sum"):
    frequency = ClassFrequency([1, 2, 50, 80, 90], total=1000)
    return EqualizationLoss(frequency, 0.01, reduction=reduction)(z, labels)


def layer(kind="linear", bias=True, seed=0):
    torch.manual_seed(seed)
    make = {"linear": nn.Linear, "conv": lambda *a, **k: nn.Conv2d(*a, 1, **k)}[kind]
    return make(D, C, bias=bias).double()


def forward(classifier, x):
    """Logits [N, C] of a linear layer, or of the places of a map of 3 by 2."""
    if isinstance(classifier, nn.Linear):
        return classifier(x)
    z = classifier(x.reshape(-1, 3, 2, D).movedim(-1, 1))
    return z.movedim(1, -1).reshape(-1, C)


def brute_force(classifier, loss, x, labels):
    """Both parts of the rows and of the logits, a backward pass per term."""
    rows, logits = torch.zeros(2, C, D), torch.zeros(2, C)
    rows, logits = rows.double(), logits.double()
    z = forward(classifier, x)
    (g,) = torch.autograd.grad(loss(z, labels), z)
    y = one_hot(labels)
    for n in range(len(x)):
        for j in range(C):
            term = forward(classifier, x)[n, j] * g[n, j]
            (grad,) = torch.autograd.grad(term, classifier.weight)
            part = int(y[n, j] == 0)
            rows[part] += grad.flatten(1)
            logits[part, j] += g[n, j].abs()
    return rows, logits


def same(found, rows, logits, **tolerance):
    want = {
        "positive_gradient": rows[0].norm(dim=1),
        "negative_gradient": rows[1].norm(dim=1),
        "positive_logit": logits[0],
        "negative_logit": logits[1],
    }
    for name, value in want.items():
        assert torch.allclose(found[name], value, **tolerance), name


# Against brute force


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss", [sigmoid, softmax, eql])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_both_parts_are_those_of_brute_force(kind, bias, loss, reduction):
    classifier, (x, labels) = layer(kind, bias), batch()
    rows, logits = brute_force(
        classifier, lambda z, t: loss(z, t, reduction), x, labels
    )
    meter = GradientMeter(classifier, "softmax" if loss is softmax else "sigmoid")
    z = forward(classifier, x)
    meter.observe(labels)
    loss(z, labels, reduction).backward()
    found = meter.results()
    same(found, rows, logits)
    p = z.softmax(1) if loss is softmax else z.sigmoid()
    own = labels < C
    positives = torch.bincount(labels[own], minlength=C)
    score = torch.stack([p[labels == j, j].mean() for j in range(C)])
    assert torch.equal(found["positives"], positives.double())
    assert torch.allclose(found["positive_score"], score, equal_nan=True)
    assert all(value.dtype == torch.float64 for value in found.values())


def test_several_classes_per_region():
    classifier, (x, _) = layer(), batch()
    y = (torch.rand(N, C, generator=torch.Generator().manual_seed(1)) < 0.4).double()
    z = classifier(x)
    g = z.detach().sigmoid() - y
    meter = GradientMeter(classifier, "sigmoid")
    z = classifier(x)
    meter.observe(y)
    F.binary_cross_entropy_with_logits(z, y, reduction="sum").backward()
    rows = torch.stack([(y * g).T @ x, ((1 - y) * g).T @ x])
    same(meter.results(), rows, torch.stack([(y * g.abs()).sum(0), (g - y * g).sum(0)]))


# Steps


def train(classifier, meter, parts, *, steps=3, scale=1.0, set_to_none=True):
    optimiser = torch.optim.SGD(classifier.parameters(), 0.1)
    for t in range(steps):
        x, labels = batch(seed=t)
        for i in range(0, N, N // parts):
            z = classifier(x[i : i + N // parts])
            part = labels[i : i + N // parts]
            meter.observe(part, scale=scale)
            (sigmoid(z, part) * scale).backward()
        for p in classifier.parameters():
            p.grad /= scale
        optimiser.step()
        optimiser.zero_grad(set_to_none=set_to_none)
    return meter.results()


def equal(a, b, **tolerance):
    return all(torch.allclose(a[k], b[k], equal_nan=True, **tolerance) for k in a)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradients_are_one_step(parts, set_to_none):
    found = []
    for k in (1, parts):
        classifier = layer()
        meter = GradientMeter(classifier, "sigmoid")
        found.append(train(classifier, meter, k, set_to_none=set_to_none))
        assert meter.state_dict()["seen"] == 3
    assert equal(*found)


def test_results_are_means_over_the_steps():
    whole, alone = layer(), layer()
    meter, single = GradientMeter(whole, "sigmoid"), GradientMeter(alone, "sigmoid")
    seen = []
    for t in range(3):
        x, labels = batch(seed=t)
        for classifier, each in ((whole, meter), (alone, single)):
            classifier.weight.grad = None
            z = classifier(x)
            each.observe(labels)
            sigmoid(z, labels).backward()
        seen.append(single.results())
        single.reset()
    found = meter.results()
    for name in ("positive_gradient", "negative_gradient", "positive_logit"):
        mean = torch.stack([step[name] for step in seen]).mean(0)
        assert torch.allclose(found[name], mean), name


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("zero", ["first", "before backward", "last"])
@pytest.mark.parametrize("step", [True, False])
def test_each_step_is_one_whoever_ends_it(fused, zero, set_to_none, step):
    """A fused optimiser's change of the weight is not among those torch counts."""
    linear, (x, labels) = layer(), batch()
    optimiser = torch.optim.AdamW(linear.parameters(), 1e-9, fused=fused)
    meter = GradientMeter(linear)

    def clear(place):
        if place == zero:
            optimiser.zero_grad(set_to_none)

    for _ in range(4):
        clear("first")
        z = linear(x)
        meter.observe(labels)
        clear("before backward")
        F.cross_entropy(z, labels.clamp(max=C - 1)).backward()
        if step:
            optimiser.step()
        clear("last")
    assert meter.state_dict()["total"][-1].tolist() == [4] * C
    assert meter.state_dict()["seen"] == 4


def test_a_weight_that_is_replaced_or_computed_is_named():
    linear, (x, labels) = layer(), batch()
    meter = GradientMeter(linear)
    linear.load_state_dict(linear.state_dict(), assign=True)
    linear(x)
    with pytest.raises(RuntimeError, match="observe: .* the weight replaced"):
        meter.observe(labels)
    with pytest.raises(ValueError, match="classifier must be trained"):
        GradientMeter(nn.utils.parametrizations.weight_norm(layer()))
    meter = GradientMeter(linear)
    meter.detach()
    linear(x)
    with pytest.raises(RuntimeError, match="observe: the meter is detached"):
        meter.observe(labels)
    with pytest.raises(ValueError, match="state must hold totals"):
        meter.load_state_dict({})


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(0.25)])
def test_scale_is_divided_out(scale):
    found = []
    for s in (1.0, scale):
        classifier = layer()
        found.append(train(classifier, GradientMeter(classifier), 2, scale=s))
    assert equal(*found)


def test_an_overflow_counts_for_nothing():
    classifier, (x, labels) = layer(), batch()
    meter = GradientMeter(classifier)
    for factor in (1.0, float("inf"), 1.0):
        classifier.weight.grad = None
        z = classifier(x)
        meter.observe(labels)
        (sigmoid(z, labels) * factor).backward()
    found = meter.results()
    assert found["positives"].sum() == 2 * (labels < C).sum()
    assert found["negative_gradient"].isfinite().all()


def test_every_second_step_is_measured():
    a, b = layer(), layer()
    train(a, GradientMeter(a), 2, steps=1)
    often, seldom = GradientMeter(a), GradientMeter(b, every=2)
    assert train(b, seldom, 2, steps=2)["positives"].sum() == (batch()[1] < C).sum()
    train(b, seldom, 2, steps=1)
    total = sum((batch(seed=t)[1] < C).sum() for t in (0, 0))
    assert seldom.results()["positives"].sum() == total
    assert often.results()["positives"].sum() == 0


def test_two_calls_in_one_backward():
    classifier, (x, labels) = layer(), batch()
    rows, logits = brute_force(classifier, sigmoid, x, labels)
    meter = GradientMeter(classifier, "sigmoid")
    losses = []
    for part in (slice(0, 5), slice(5, N)):
        z = classifier(x[part])
        meter.observe(labels[part])
        losses.append(sigmoid(z, labels[part]))
    classifier(x)  # thrown away
    sum(losses).backward()
    same(meter.results(), rows, logits)
    assert meter.state_dict()["seen"] == 1


def test_two_passes_through_one_call_are_one_measurement():
    x, labels = batch()

    def measured(passes):
        classifier = layer()
        meter = GradientMeter(classifier)
        z = classifier(x)
        meter.observe(labels)
        losses = softmax(z, labels), z.square().mean()
        if passes == 1:
            sum(losses).backward()
        else:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        return meter.results()

    once, twice = measured(1), measured(2)
    for name, x_once in once.items():
        assert torch.allclose(x_once, twice[name]), name
    assert once["positives"].sum() == (labels < C).sum()


def test_a_pass_after_a_reset_is_not_measured():
    classifier, (x, labels) = layer(), batch()
    meter = GradientMeter(classifier, "sigmoid")
    z = classifier(x)
    meter.observe(labels)
    meter.reset()
    sigmoid(z, labels).backward()
    assert meter.state_dict()["seen"] == 0 and not meter.state_dict()["total"].any()


def test_a_glance_at_a_gradient_is_not_a_backward_pass():
    classifier, (x, labels) = layer(), batch()
    rows, logits = brute_force(classifier, sigmoid, x, labels)
    meter = GradientMeter(classifier, "sigmoid")
    x.requires_grad_()
    torch.autograd.grad(classifier(x).sum(), x)  # not observed
    z = classifier(x)
    meter.observe(labels)
    loss = sigmoid(z, labels)
    torch.autograd.grad(2 * loss, x, retain_graph=True)
    loss.backward()
    same(meter.results(), rows, logits)


def test_validation_is_not_measured():
    classifier, (x, labels) = layer(), batch()
    meter = GradientMeter(classifier)
    with torch.no_grad():
        classifier(x)
        meter.observe(labels)
    assert meter.state_dict()["seen"] == 0


def test_training_is_the_same_with_a_meter():
    a, b = layer(), layer()
    train(a, GradientMeter(a), 2)
    meter = GradientMeter(b)
    meter.detach()
    optimiser = torch.optim.SGD(b.parameters(), 0.1)
    for t in range(3):
        x, labels = batch(seed=t)
        for part in (slice(0, 6), slice(6, 12)):
            sigmoid(b(x[part]), labels[part]).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


# Precision, devices, compiling


def test_autocast_is_near_float32():
    found = []
    x, labels = batch(torch.float32, n=64)
    for enabled in (False, True):
        classifier = layer().float()
        meter = GradientMeter(classifier)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = classifier(x)
            assert z.dtype == (torch.bfloat16 if enabled else torch.float32)
            meter.observe(labels)
            loss = sigmoid(z.float(), labels)
        loss.backward()
        found.append(meter.results())
    assert equal(*found, rtol=0.03)


def test_autocast_leaves_no_negative_where_there_is_none():
    classifier = layer().float()
    meter = GradientMeter(classifier)
    x = torch.full((64, D), 1.003)  # 1 in bfloat16
    labels = torch.zeros(64, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        z = classifier(x)
        meter.observe(labels)
    z.float()[:, 0].sum().backward()  # class 0 has no other region
    found = meter.results()
    assert found["positive_gradient"][0] == 64 * D**0.5
    assert found["negative_gradient"][0] == 0 == found["negative_logit"][0]


@pytest.mark.parametrize("target", ["labels", "one-hot"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_no_host_synchronisation(activation, target):
    classifier, (x, labels) = layer(), batch()
    y, meter = one_hot(labels), GradientMeter(classifier, activation)
    optimiser = torch.optim.SGD(classifier.parameters(), 0.1, foreach=True)
    with NoSync():
        for _ in range(2):
            z = classifier(x)
            meter.observe(labels if target == "labels" else y)
            F.binary_cross_entropy_with_logits(z, y).backward()
            optimiser.step()
            optimiser.zero_grad()


def test_a_compiled_network_is_measured_too():
    torch._dynamo.reset()
    found = []
    x, labels = batch(torch.float32)
    for backend in (None, "aot_eager"):
        network = nn.Sequential(nn.ReLU(), layer().float())
        meter = GradientMeter(network[1])
        call = torch.compile(network, backend=backend) if backend else network
        for _ in range(2):
            z = call(x)
            meter.observe(labels)
            sigmoid(z, labels).backward()
            network[1].weight.grad = None
        found.append(meter.results())
    assert equal(*found)


# Processes


def one_of(rank, world, folder, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    classifier = layer()
    meter = GradientMeter(classifier, "sigmoid")
    network = DistributedDataParallel(nn.Sequential(classifier))
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    for t in range(3):
        x, labels = (part[rank::world] for part in batch(seed=t))
        half = len(x) // 2
        for i in (0, 1):
            part = slice(0, half) if i == 0 else slice(half, None)
            with network.no_sync() if i == 0 else nullcontext():
                z = network(x[part])
                meter.observe(labels[part])
                (sigmoid(z, labels[part]) / len(x)).backward()
        optimiser.step()
        optimiser.zero_grad()
    state = meter.state_dict(), meter.results(), classifier.state_dict()
    torch.save(state, Path(folder) / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    port = 20000 + os.getpid() % 20000
    for world in (1, 2):
        mp.spawn(one_of, (world, str(tmp_path), port + world), nprocs=world)
    one, first, second = (
        torch.load(tmp_path / f"{n}.pt") for n in ("1-0", "2-0", "2-1")
    )
    assert torch.allclose(one[2]["weight"], first[2]["weight"])
    assert equal(one[1], first[1])
    assert torch.equal(first[0]["total"], second[0]["total"])


# State


def test_state_goes_on_where_it_was(tmp_path):
    classifier = layer()
    meter = GradientMeter(classifier, "sigmoid", every=2)
    train(classifier, meter, 2)
    torch.save([meter.state_dict(), classifier.state_dict()], tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = layer(seed=1)
    loaded.load_state_dict(weights)
    other = GradientMeter(loaded, "sigmoid", every=2)
    other.load_state_dict(state)
    assert equal(meter.results(), other.results())
    assert equal(train(classifier, meter, 2), train(loaded, other, 1))
    meter.reset()
    assert meter.results()["positives"].sum() == 0 and meter.state_dict()["seen"] == 0


def test_detach_leaves_no_hooks():
    classifier, (x, labels) = layer(), batch()
    meter = GradientMeter(classifier)
    found = train(classifier, meter, 1)
    assert classifier._forward_hooks and classifier.weight._backward_hooks
    meter.detach()
    meter.detach()
    assert not classifier._forward_hooks and not classifier.weight._backward_hooks
    sigmoid(classifier(x), labels).backward()
    assert equal(meter.results(), found)


def test_a_network_with_a_meter_can_be_copied_and_saved():
    classifier, (x, labels) = layer(), batch()
    meter = GradientMeter(classifier)
    train(classifier, meter, 1)
    before = meter.results()
    classifier(x)
    average = copy.deepcopy(classifier)
    torch.save(classifier, io.BytesIO())
    sigmoid(average(x), labels).backward()
    assert equal(meter.results(), before)


# Figure and errors


def test_plot_sorts_by_frequency():
    classifier = layer()
    meter = GradientMeter(classifier, "sigmoid")
    found = train(classifier, meter, 1)
    frequency = ClassFrequency([1, 9, 3, 7, 5])
    ax = meter.plot(frequency)
    order = [1, 3, 4, 2, 0]
    heights = ax.lines[2].get_ydata()
    assert heights.tolist() == found["negative_gradient"][order].tolist()
    assert meter.plot(frequency, ax=ax) is ax
    plt.close("all")


def test_bad_arguments_are_named():
    linear = layer()
    for bad in (
        nn.Conv2d(D, C, 3),
        nn.Conv2d(D, C, 1, 2),
        nn.Conv2d(4, 4, 1, groups=2),
    ):
        with pytest.raises(ValueError, match="classifier must be a 1×1"):
            GradientMeter(bad)
    with pytest.raises(ValueError, match="classifier must be a 1×1"):
        GradientMeter(nn.Conv2d(D, C, 1, padding=1))
    with pytest.raises(TypeError, match="classifier must be nn.Linear .* ReLU"):
        GradientMeter(nn.ReLU())
    with pytest.raises(ValueError, match="classifier must be trained"):
        GradientMeter(layer().requires_grad_(False))
    with pytest.raises(ValueError, match="activation must be one of .* 'tanh'"):
        GradientMeter(linear, "tanh")
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="every must be"):
            GradientMeter(linear, every=bad)
    assert not linear._forward_hooks and not linear.weight._backward_hooks


def test_bad_calls_are_named():
    linear, (x, labels) = layer(), batch()
    meter = GradientMeter(linear)
    with pytest.raises(RuntimeError, match="must follow a call"):
        meter.observe(labels)
    z = linear(x)
    for bad in (labels.int(), labels > 2, [0] * N):
        with pytest.raises(TypeError, match="target must be an int64 or float"):
            meter.observe(bad)
    for bad in (labels[1:], one_hot(labels)[:, 1:], one_hot(labels).long()):
        with pytest.raises(ValueError, match=r"target must be int64 \[12\] or float"):
            meter.observe(bad)
    with pytest.raises(ValueError, match="scale must be above 0"):
        meter.observe(labels, scale=0)
    with pytest.raises(RuntimeError, match="must stand before backward"):
        z.sum().backward()
    with pytest.raises(ValueError, match=r"totals \[7, 5\].*, got \[7, 9\]"):
        meter.load_state_dict(GradientMeter(nn.Linear(D, 9)).state_dict())
    with pytest.raises(ValueError, match="frequency must have 5 classes, got 3"):
        meter.plot(ClassFrequency([1, 2, 3]))
    with pytest.raises(TypeError, match="frequency must be a ClassFrequency"):
        meter.plot([1, 2, 3, 4, 5])
