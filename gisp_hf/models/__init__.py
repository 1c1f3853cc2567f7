"""Structures of models: description, discovery and removal."""

from gisp_hf.models.discovery import discover, family_of
from gisp_hf.models.families import FAMILIES, BlockRow, Family, Projection, register_family
from gisp_hf.models.layout import KINDS, Block, Kind, Layout, Member, register_kind

__all__ = [
    "FAMILIES",
    "KINDS",
    "Block",
    "BlockRow",
    "Family",
    "Kind",
    "Layout",
    "Member",
    "Projection",
    "discover",
    "family_of",
    "register_family",
    "register_kind",
]
