"""Time and memory of our Mask R-CNN beside torchvision's, at LVIS's number of classes.

    python tools/bench_detector.py                     small images, for a CPU
    python tools/bench_detector.py --device cuda --size 800 --backbone resnet50

Both have the same network, softmax loss, a mask per class, and no score threshold.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import maskrcnn_loss, project_masks_on_boxes

from eql_repro.detector import mask_rcnn
from eql_repro.regions import class_masks, mask_loss
from eql_repro.rivals import SoftmaxCrossEntropy

MB = 2**20


def peak(device: str) -> float:
    """Largest memory since `forget`, in MB: of the device, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MB
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget(device: str) -> float:
    """Begin a new peak; return the memory in use, in MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MB
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def measure(task: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds of a task, and the memory it adds at most, in MB."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    before = forget(device)
    wait()
    start = time.perf_counter()
    task()
    wait()
    return time.perf_counter() - start, peak(device) - before


def mask_tasks(o: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Last layer of the mask head and its loss, forward and backward."""
    last = nn.Conv2d(256, o.classes, 1).to(o.device)
    x = torch.rand(o.masks, 256, 28, 28, device=o.device, requires_grad=True)
    labels = torch.randint(o.classes, (o.masks,), device=o.device)
    boxes = torch.tensor([[0.0, 0, 20, 20]], device=o.device).repeat(o.masks, 1)
    truth = torch.ones(o.masks, 32, 32, device=o.device)
    index = torch.arange(o.masks, device=o.device)

    def theirs():
        maskrcnn_loss(last(x), [boxes], [truth], [labels], [index]).backward()

    def ours():
        goals = project_masks_on_boxes(truth, boxes, index, 28)
        mask_loss(class_masks(x, last.weight, last.bias, labels), goals).backward()

    return {"torchvision": theirs, "ours": ours}


def models(o: argparse.Namespace) -> dict[str, nn.Module]:
    """Both detectors, from scratch."""
    options = {"backbone": o.backbone, "min_size": o.size, "max_size": 2 * o.size}
    options |= {"class_agnostic_mask": False}
    ours = mask_rcnn(o.classes, SoftmaxCrossEntropy(), **options)
    twin = mask_rcnn(o.classes, SoftmaxCrossEntropy(), **options)
    theirs = MaskRCNN(
        twin.backbone,
        o.classes + 1,
        min_size=o.size,
        max_size=2 * o.size,
        rpn_anchor_generator=twin.rpn.anchor_generator,
        box_score_thresh=0.0,
        box_detections_per_img=300,
    )
    return {"torchvision": theirs.to(o.device), "ours": ours.to(o.device)}


def batch(o: argparse.Namespace) -> tuple[list, list]:
    """Images of noise with ten objects each."""
    images, targets, side = [], [], o.size / 5
    for _ in range(o.images):
        corner = torch.rand(10, 2) * (o.size - side)
        boxes = torch.cat([corner, corner + side], 1)
        masks = torch.zeros(10, o.size, o.size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(1, o.classes, (10,))
        target = {"boxes": boxes, "masks": masks, "labels": labels}
        targets.append({k: v.to(o.device) for k, v in target.items()})
        images.append(torch.rand(3, o.size, o.size, device=o.device))
    return images, targets


def step(model: nn.Module, images: list, targets: list) -> Callable[[], None]:
    """A training step without the optimiser, which is the same for both."""

    def task():
        model.zero_grad()
        sum(model.train()(images, targets).values()).backward()

    return task


def detect(model: nn.Module, images: list) -> Callable[[], None]:
    """Detection in a batch."""

    def task():
        with torch.no_grad():
            model.eval()(images)

    return task


def report(name: str, tasks: dict[str, Callable[[], None]], o) -> None:
    """Print the medians of seconds and MB, and their ratios; the first warms up."""
    found = {who: [] for who in tasks}
    for _ in range(o.repeat + 1):  # in turn, so that other work hits both
        for who, task in tasks.items():
            found[who].append(measure(task, o.device))
    medians = {
        who: [statistics.median(x) for x in zip(*rows[1:], strict=True)]
        for who, rows in found.items()
    }
    for who, (seconds, megabytes) in medians.items():
        print(f"{name:15}{who:13}{1000 * seconds:10.1f} ms{megabytes:10.0f} MB")
    (a, b), (c, d) = medians["torchvision"], medians["ours"]
    print(f"{name:15}{'ratio':13}{a / c:10.2f}   {b / max(d, 1):10.2f}\n")


def main() -> None:
    """Measure the mask head, a training step and detection."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backbone", default="resnet18")
    parts = ("mask head", "training step", "detection")
    parser.add_argument("--only", choices=parts, help="one of the three")
    for name, value in (("classes", 1230), ("size", 256), ("images", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("masks", 256), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name() if o.device == "cuda" else platform.processor()
    print(f"{o}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {gpu}\n")
    pair, (images, targets) = models(o), batch(o)
    tasks = {
        "mask head": mask_tasks(o),
        "training step": {k: step(m, images, targets) for k, m in pair.items()},
        "detection": {k: detect(m, images) for k, m in pair.items()},
    }
    for name in [o.only] if o.only else parts:
        report(name, tasks[name], o)


if __name__ == "__main__":
    main()
