"""What `GradientMeter` costs: steps with and without it, in turn, in one run.

    python tools/bench_gradients.py [--device cuda] [--rounds 15] [--clock cpu]

Each round times all of them, so that a busy machine slows all. Printed is the time of
a step with the meter over the one without: the median of the rounds, and the range of
their middle half. "without twice" is a second run without: what chance does. On a
machine shared with others, the clock of this process says more than that on the wall.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eql_repro.classifier import classifier
from eql_repro.gradients import GradientMeter


def mlp() -> tuple[nn.Module, nn.Module, Tensor, int]:
    """The box head of a detector: two hidden layers, 512 regions, LVIS's classes."""
    hidden = [nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(1024, 1230))
    return model, model[-1], torch.randn(512, 2048), 1230


def images() -> tuple[nn.Module, nn.Module, Tensor, int]:
    """ResNet-32 on 64 images of 32 × 32 and LVIS's classes."""
    model = classifier("resnet32", 1230)
    return model, model.fc, torch.randn(64, 3, 32, 32), 1230


def stepper(case: Callable, activation: str, every: int, device: str) -> Callable:
    """A function that trains for some steps; `every` = 0 is without a meter."""
    torch.manual_seed(0)
    model, layer, x, classes = case()
    model, x = model.to(device), x.to(device)
    labels = torch.randint(0, classes, (len(x),)).to(device)
    y = F.one_hot(labels, classes).float()
    meter = GradientMeter(layer, activation, every) if every else None
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def run(steps: int) -> None:
        for _ in range(steps):
            z = model(x)
            if meter:
                meter.observe(labels)
            if activation == "softmax":
                loss = F.cross_entropy(z, labels)
            else:
                loss = F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(
                    x
                )
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return run


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Callable, steps: int, clock: str) -> float:
    start = CLOCKS[clock]()
    run(steps)
    return CLOCKS[clock]() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    for case in (mlp, images):
        for activation in ("sigmoid", "softmax"):
            runs = [stepper(case, activation, k, options.device) for k in (0, 0, 1, 10)]
            for run in runs:
                run(3)
            how = options.steps, options.clock
            rounds = [[seconds(r, *how) for r in runs] for _ in range(options.rounds)]
            times = torch.tensor(rounds)
            for name, k in (("without twice", 1), ("every=1", 2), ("every=10", 3)):
                ratio = times[:, k] / times[:, 0]
                low, middle, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75]))
                print(f"{case.__name__:8}{activation:9}{name:15}{middle:.3f}", end="")
                print(f"  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
