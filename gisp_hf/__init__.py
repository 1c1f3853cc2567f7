"""GISP (Global Iterative Structured Pruning, arXiv 2510.18030) for the Hugging Face Trainer.

Importing the package also teaches the Auto classes and PEFT the pruned checkpoints that it writes.
"""

from transformers import AutoConfig

from gisp_hf import deprecated
from gisp_hf.config import GISPConfig
from gisp_hf.levels.materialize import load_level
from gisp_hf.models import FAMILIES
from gisp_hf.models.wrapped import scoring_only
from gisp_hf.pruner import GISPPruner, prune
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.folder import restore_level
from gisp_hf.recovery.restore import restore
from gisp_hf.upstream import teach_peft
from gisp_hf.version import __version__

__all__ = [
    "GISPConfig",
    "GISPPruner",
    "RestoreConfig",
    "Trajectory",
    "__version__",
    "load_level",
    "prune",
    "restore",
    "restore_level",
    "scoring_only",
]

deprecated.install()

for _family in FAMILIES:
    AutoConfig.register(_family.pruned_config.model_type, _family.pruned_config)
    teach_peft(_family.model_type, _family.pruned_config.model_type)
