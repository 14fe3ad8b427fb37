"""Device mixes are found without a GPU: tensors that say they lie on another device.

A `Far` tensor says that it is on the device "lazy"; its numbers lie on the CPU. In an
`Elsewhere` block, operations refuse what CUDA refuses, and give the CPU's numbers.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from eql_repro import (
    ClassFrequency,
    EqualizationLoss,
    SoftmaxEqualizationLoss,
    bench,
    bench_images,
    regions,
    rivals,
)
from eql_repro.classifier import classifier
from eql_repro.classify import scores_of
from eql_repro.detector import cascade_mask_rcnn
from eql_repro.gradients import GradientMeter
from eql_repro.images import augment, normalize, uniforms
from eql_repro.recipe import Recipe

FAR = torch.device("lazy")
MOVES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")


class Far(Tensor):
    """A tensor that is on the device "lazy" for all but the processor."""

    @staticmethod
    def __new__(cls, near: Tensor):
        form = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        form |= {"dtype": near.dtype, "device": FAR}
        return Tensor._make_wrapper_subclass(cls, near.shape, **form)

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def tolist(self) -> list:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Makes `device="lazy"` and `.to("lazy")` give tensors of that kind."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # of torch.tensor(…, device="lazy")
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)


def refuse_mix(func, args: tuple, kwargs: dict) -> None:
    """Raise where CUDA would: a scalar on the CPU joins in, an index too."""
    index = args[1] if func._schema.name in INDEXING else ()
    places = {isinstance(x, Far) for x in tree_leaves((args, kwargs)) if is_tensor(x)}
    if func._schema.name in MOVES or len(places) < 2:
        return
    rest = (args[0], args[2:]) if index else (args, kwargs)
    near = [x for x in tree_leaves(rest) if is_tensor(x) and not isinstance(x, Far)]
    scalars = torch.Tag.pointwise in func.tags and isinstance(args[0], Far)
    scalars |= torch.Tag.pointwise in func.tags and not func._schema.is_mutable
    if any(x.ndim or not scalars for x in near):
        raise RuntimeError(f"{func}: tensors on lazy and on cpu")


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def called(func, args: tuple, kwargs: dict):
    """What an operation gives, on the device where CUDA would give it."""
    refuse_mix(func, args, kwargs)
    far = any(isinstance(x, Far) for x in tree_leaves((args, kwargs)))
    near = tree_map_only(Far, lambda x: x.near, (args, kwargs))
    if kwargs.get("device") is not None:
        far = torch.device(kwargs["device"]).type == FAR.type
        near[1]["device"] = "cpu"
    elif func._schema.name in MOVES:
        far = isinstance(args[0], Far)
    found = func(*near[0], **near[1])
    if not far:
        return found
    return return_and_correct_aliasing(
        func, args, kwargs, tree_map_only(Tensor, Far, found)
    )


def same_on_both(work) -> None:
    """Assert that `work(device)` gives equal numbers on both, each on its device."""
    near = work("cpu")
    with Elsewhere():
        far = work(FAR)
    for a, b in zip(tree_leaves(near), tree_leaves(far), strict=True):
        if is_tensor(a):
            assert isinstance(b, Far) and a.dtype == b.dtype
            rtol = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
            assert torch.allclose(a, b.near, rtol, atol=1e-7, equal_nan=True)
        else:
            assert a == b


C = 30
FREQUENCY = ClassFrequency(torch.arange(1, C + 1) * 3)
EQL = partial(EqualizationLoss, FREQUENCY, 0.05)
SEQL = partial(SoftmaxEqualizationLoss, FREQUENCY, 0.05, gamma=1.0)
LOSSES = {
    "eql": EQL,
    "eql, weighted": partial(EQL, threshold="gompertz"),
    "seql": SEQL,
    "seql, weighted": partial(SEQL, threshold="exponential"),
    "seql, per sample": partial(SEQL, per_sample=True),
    "sigmoid": rivals.SigmoidCrossEntropy,
    "softmax": rivals.SoftmaxCrossEntropy,
    "focal": rivals.FocalLoss,
    "class-balanced": partial(rivals.ClassBalancedLoss, FREQUENCY),
    "weighted": partial(rivals.ClassWeightedLoss, FREQUENCY, form="sigmoid"),
    "eqlv2": partial(rivals.EQLv2, C),
    "seesaw": partial(rivals.SeesawLoss, C),
    "balanced": partial(rivals.BalancedSoftmaxLoss, FREQUENCY),
    "ldam": partial(rivals.LDAMLoss, FREQUENCY),
}


def test_a_mix_is_refused_as_by_cuda():
    x, index = torch.arange(6.0), torch.tensor([1, 2])
    with Elsewhere():
        y = x.to(FAR)
        for mix in (
            lambda: x + y, lambda: torch.cat([x, y]), lambda: x[index.to(FAR)],
            lambda: x.sum().add_(y.sum()), lambda: y.index_add_(0, index, y[:2]),
            lambda: torch.stack([y.sum(), x.sum()]), lambda: y.numpy(),
        ):  # fmt: skip
            with pytest.raises(RuntimeError):
                mix()
        assert isinstance(y * x.sum(), Far) and isinstance(y[index], Far)
        assert isinstance(torch.tensor([1.0], device=FAR), Far)
        assert not isinstance(y.cpu(), Far) and y.tolist() == x.tolist()


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("n, dtype", [(8, torch.bfloat16), (2**14, torch.float32)])
def test_losses(make, n, dtype):
    classes = C + (make().activation == "sigmoid")
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, C, generator=draw)).to(dtype)
    labels = torch.randint(classes, (n,), generator=draw)

    def work(device):
        z = logits.to(device, copy=True).requires_grad_()
        loss = make().to(device)
        value = loss(z, labels.to(device))
        value.backward()
        assert value.dtype == torch.float32 and z.grad.dtype == dtype
        return value.detach(), z.grad, dict(loss.named_buffers())

    same_on_both(work)


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_labels_elsewhere_are_named(make):
    loss = make().to("meta")
    with pytest.raises(ValueError, match="target must be on .* meta, target on cpu"):
        loss(torch.zeros(2, C, device="meta"), torch.tensor([1, 2]))


@pytest.mark.parametrize("kind", [nn.Linear, partial(nn.Conv2d, kernel_size=1)])
def test_meter(kind):
    def work(device):
        torch.manual_seed(0)
        layer, shape = kind(5, C), (3, 5, 2, 2) if kind is not nn.Linear else (12, 5)
        x, labels = torch.randn(shape).to(device), torch.randint(C + 1, (12,))
        labels, meter = labels.to(device), GradientMeter(layer.to(device), "sigmoid")
        for _ in range(2):
            z = layer(x)
            z = z.movedim(1, -1).reshape(-1, C)
            meter.observe(labels)
            rivals.sigmoid_terms(z, labels).sum().backward()
            layer.zero_grad()
            meter.load_state_dict(meter.state_dict())
        assert not any(isinstance(x, Far) for x in meter.results().values())
        return {k: str(v) for k, v in meter.results().items()}

    same_on_both(work)


def test_meter_names_labels_elsewhere():
    layer = nn.Linear(5, C, device="meta")
    meter = GradientMeter(layer)
    layer(torch.zeros(2, 5, device="meta"))
    with pytest.raises(ValueError, match="target must be on .* meta, target on cpu"):
        meter.observe(torch.tensor([1, 2]))


def test_a_step_of_a_classifier():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=draw)

    def work(device):
        torch.manual_seed(0)
        network, loss = classifier("resnet8", C).to(device), SEQL().to(device)
        x = normalize(augment(images.to(device), uniforms(0, 3, 16)))
        loss(network(x), torch.arange(16).to(device)).backward()
        torch.optim.SGD(network.parameters(), 0.1, 0.9, nesterov=True).step()
        p = scores_of(network.eval(), "softmax", [normalize(images.to(device))])
        assert not isinstance(p, Far)
        return x, dict(network.named_parameters())

    same_on_both(work)


def objects(device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with two objects each."""
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 10, 60, 50]])
    masks = torch.zeros(2, 64, 72, dtype=torch.uint8)
    masks[0, 6:40, 4:30] = masks[1, 10:50, 20:60] = 1
    target = {"boxes": boxes, "masks": masks, "labels": torch.tensor([1, 8])}
    target["neg_labels"] = torch.tensor([2])
    images = torch.arange(2 * 3 * 64 * 72).view(2, 3, 64, 72) % 251
    targets = [target | {"image_id": torch.tensor(i)} for i in range(2)]
    far = [{k: v.to(device) for k, v in t.items()} for t in targets]
    return [x.to(device) for x in images.to(torch.uint8)], far


def test_a_step_and_a_search_of_a_detector(monkeypatch):
    drawn = regions.device_generator  # there is no generator of this device
    monkeypatch.setattr(regions, "device_generator", lambda *key: drawn(*key[:2]))
    options = {"backbone": "resnet18", "min_size": 64, "max_size": 72, "channels": 16}
    options |= {"hidden": 32, "proposals": (40, 20), "regions": 16}
    options |= {"spare_classes": True, "normalizer": "image", "mask_output": "rle"}
    options |= {"class_agnostic_mask": False, "box_detections": 4}
    options |= {"anchor_sizes": (8, 16, 32, 48, 64)}

    def work(device):
        torch.manual_seed(0)
        model = cascade_mask_rcnn(C, EQL(), **options).to(device).train()
        images, targets = objects(device)
        losses = model(images, targets, key=(0, 1))
        sum(losses.values()).backward()
        with torch.no_grad():
            found = model.eval()(images)
        grad = model.roi_heads.box_predictor.cls_score.weight.grad
        return {k: v.detach() for k, v in losses.items()}, grad, found

    same_on_both(work)


def test_the_choice_of_workers_waits_for_the_device(monkeypatch):
    waits = []
    monkeypatch.setattr(bench, "_wait", waits.append)
    monkeypatch.setattr(bench_images, "usual_batches", lambda *options: None)
    monkeypatch.setattr(bench_images, "Usual", lambda *parts: lambda: None)
    given = Recipe("none"), None, torch.device("cpu")
    assert bench_images.best_workers(*given, (1, 2))[0] in (1, 2)
    assert len(waits) == 4  # before and after the steps of each
