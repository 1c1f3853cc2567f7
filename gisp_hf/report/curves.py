"""The picture of a model card: perplexity by sparsity, as far as the levels say."""

import io
from collections.abc import Sequence
from importlib.util import find_spec

from gisp_hf.levels.info import LevelInfo
from gisp_hf.report.plots import plot_perplexity

CURVES_FILE = "perplexity.png"


def has_curves(levels: Sequence[LevelInfo]) -> bool:
    """Whether there is something to draw, a perplexity of two levels, and something to draw it with."""
    return bool(_curves(levels)) and find_spec("matplotlib") is not None


def perplexity_picture(levels: Sequence[LevelInfo]) -> bytes:
    """A PNG. The same levels give the same bytes, with one version of matplotlib.

    Raises:
        ValueError: if no perplexity is known of two levels.
        ImportError: matplotlib is not installed.
    """
    file = io.BytesIO()
    plot_perplexity(_curves(levels), file)
    return file.getvalue()


def _curves(levels: Sequence[LevelInfo]) -> dict[str, list[tuple[float, float]]]:
    """Name of each perplexity -> (sparsity, value), of two levels or more."""
    names = dict.fromkeys(name for level in levels for name in level.metrics if "perplexity" in name.lower())
    found = {name: [(lv.sparsity, v) for lv in levels if (v := lv.metrics.get(name)) is not None] for name in names}
    return {name: points for name, points in found.items() if len(points) > 1}
