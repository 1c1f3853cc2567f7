"""Which parameters of a model form structures: one table row per family, and the reader of that table."""

from gisp_hf.models.discovery import discover, family_of
from gisp_hf.models.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "discover", "family_of"]
