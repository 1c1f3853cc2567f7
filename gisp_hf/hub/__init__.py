"""A run's output folder <-> a repository on the Hub, with one branch per level.

Each level is a branch that starts at the repository's first, empty commit and gets everything in one atomic commit, so
that a half-made level fails to load instead of loading something else. ``main`` comes last: the mildest level, the full
trajectory, the card, and ``levels.json``. All bytes are deterministic, and what is there already is neither sent nor
committed again: another push of the same folder finishes one that was cut off, and otherwise changes nothing.
"""

from gisp_hf.hub.failures import PushError
from gisp_hf.hub.push import LevelUploader, PushReport, push_levels
from gisp_hf.levels.info import LevelInfo, read_levels, write_metrics

__all__ = ["LevelInfo", "LevelUploader", "PushError", "PushReport", "push_levels", "read_levels", "write_metrics"]
