"""Levels in the formats of other programs."""

from gisp_hf.export.gguf import GGUFReport, export_gguf

__all__ = ["GGUFReport", "export_gguf"]
