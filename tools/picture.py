"""Draw the picture of the site's first page, for light and for dark pages.

Rows are regions of one class, columns the classes whose scores they move. All of it is
the gradient of the package's losses at the start of training.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb

from eql_repro import equalization_loss

SIDE = {"light": ("#222832", "#ffffff"), "dark": ("#ced6dd", "#121212")}
FAINT = 0.3  # how much of its colour the smallest push has, to be seen on the ground
UP, DOWN, GREY = "#0072B2", "#D55E00", "#999999"
COUNTS = torch.tensor([1000, 600, 360, 215, 130, 77, 46, 28, 17, 10])
BACKGROUND, TAIL = 1500, 5  # background regions; the first class of the tail


def gradients(tail: torch.Tensor) -> torch.Tensor:
    """What the regions of each class, and background last, add to each logit."""
    z = torch.zeros(11, 10, requires_grad=True)
    regions = torch.cat([COUNTS, torch.tensor([BACKGROUND])])
    terms = equalization_loss(z, torch.arange(11), tail, reduction="none")
    (terms.sum(1) * regions).sum().backward()
    return z.grad


def grid(ax, push: torch.Tensor, ground: str) -> None:
    """One cell per pair: orange pushes down, blue pulls up, empty is nothing."""
    norm = LogNorm(1, 1000)
    for sign, colour in ((1, DOWN), (-1, UP)):
        part = (sign * push).clamp(min=0)
        shown = torch.where(part > 0, part, torch.nan)
        pair = zip(to_rgb(ground), to_rgb(colour), strict=True)
        least = [(1 - FAINT) * a + FAINT * b for a, b in pair]
        colours = LinearSegmentedColormap.from_list("", [least, colour])
        ax.pcolormesh(shown, cmap=colours, norm=norm, ec=ground, lw=2)
    ax.invert_yaxis()
    ax.set(xticks=[], yticks=[], aspect="equal")


def draw(mode: str, path: Path) -> None:
    """The two grids and, below, what a class gets against what it takes."""
    ink, ground = SIDE[mode]
    style = {name: ink for name in ("text.color", "xtick.color", "ytick.color")}
    style |= {"axes.labelcolor": ink, "axes.edgecolor": ink, "font.size": 12}
    style |= {"svg.hashsalt": "eql", "axes.spines.top": False}
    style |= {"axes.spines.right": False, "figure.constrained_layout.use": True}
    with plt.rc_context(style):
        fig, axes = plt.subplots(2, 2, figsize=(6.6, 4.9), height_ratios=[3, 1])
        tails = torch.zeros(10).bool(), torch.arange(10) >= TAIL
        titles = "Sigmoid loss", "Equalization loss"
        for (top, below), tail, title in zip(axes.T, tails, titles, strict=True):
            push = gradients(tail)
            grid(top, push, ground)
            for side in top.spines.values():
                side.set_visible(False)
            top.set_title(title, fontweight="bold", pad=12)
            up, down = -push.diagonal(), push.clamp(min=0).sum(0)
            colours = [GREY] * TAIL + [DOWN] * (10 - TAIL)
            below.bar(torch.arange(10) + 0.5, up / down, 0.8, color=colours)
            below.set(yscale="log", ylim=(1e-3, 1.5), xlim=(0, 10), xticks=[])
            below.set_xlabel("frequent  ←  class  →  rare")
            below.set_yticks([0.001, 0.01, 0.1, 1], ["1/1000", "1/100", "1/10", "1"])
            below.minorticks_off()
        axes[0, 0].set_yticks([2.5, 7.5, 10.5], ["frequent", "rare", "background"])
        axes[0, 0].tick_params(length=0)
        axes[0, 0].set_ylabel("objects of")
        axes[1, 0].set_ylabel("pull up / push down")
        fig.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(fig)
