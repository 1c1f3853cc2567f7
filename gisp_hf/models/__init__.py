"""Structures of models: description, discovery and removal.

Importing it also teaches the Auto classes elastic checkpoints.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from gisp_hf.models.discovery import discover, family_of
from gisp_hf.models.families import FAMILIES, BlockRow, Family, Projection, register_family
from gisp_hf.models.layout import KINDS, Block, Kind, Layout, Member, register_kind
from gisp_hf.models.modeling_elastic import ElasticModelMixin

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

for _elastic in ElasticModelMixin.__subclasses__():
    AutoConfig.register(_elastic.config_class.model_type, _elastic.config_class)
    AutoModelForCausalLM.register(_elastic.config_class, _elastic)
