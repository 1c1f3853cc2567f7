"""The losses that a calibration run minimises. Torch alone."""

from gisp_hf.losses.chunked import ChunkedLoss
from gisp_hf.losses.objectives import (
    completion_losses,
    decode_weights,
    encode_weight,
    language_modeling_loss,
    margin_loss,
)

__all__ = [
    "ChunkedLoss",
    "completion_losses",
    "decode_weights",
    "encode_weight",
    "language_modeling_loss",
    "margin_loss",
]
