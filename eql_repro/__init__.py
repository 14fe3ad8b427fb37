"""Equalization Loss for Long-Tailed Object Recognition (Tan et al., CVPR 2020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eql_repro.eql import EqualizationLoss, equalization_loss
    from eql_repro.longtail import ClassFrequency
    from eql_repro.seql import SoftmaxEqualizationLoss, softmax_equalization_loss

__version__ = "0.1.0"

__all__ = [
    "ClassFrequency",
    "EqualizationLoss",
    "SoftmaxEqualizationLoss",
    "equalization_loss",
    "softmax_equalization_loss",
]

_HOMES = {
    "ClassFrequency": "longtail",
    "EqualizationLoss": "eql",
    "equalization_loss": "eql",
    "SoftmaxEqualizationLoss": "seql",
    "softmax_equalization_loss": "seql",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for, so that what needs no torch loads none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
