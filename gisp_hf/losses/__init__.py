"""The losses that a calibration run minimises. Torch alone."""

from gisp_hf.losses.chunked import ChunkedLoss
from gisp_hf.losses.distillation import Distillation, forward_kl
from gisp_hf.losses.objectives import (
    completion_losses,
    decode_weights,
    encode_weight,
    language_modeling_loss,
    margin_loss,
)

__all__ = [
    "ChunkedLoss",
    "Distillation",
    "completion_losses",
    "decode_weights",
    "encode_weight",
    "forward_kl",
    "language_modeling_loss",
    "margin_loss",
]
