"""Equalization Loss for Long-Tailed Object Recognition (Tan et al., CVPR 2020)."""

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
