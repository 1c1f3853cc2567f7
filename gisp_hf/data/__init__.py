"""Text and questions -> batches, and the loss that belongs to them."""

from gisp_hf.data.calibration import Calibration, load_calibration
from gisp_hf.data.encoding import CandidateCollator, encode_completion
from gisp_hf.data.self_answers import AnsweredPrompts, AnswerSettings

__all__ = [
    "AnswerSettings",
    "AnsweredPrompts",
    "Calibration",
    "CandidateCollator",
    "encode_completion",
    "load_calibration",
]
