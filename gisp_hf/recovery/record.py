"""The record of a restoration: ``restoration.json`` in a level's folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gisp_hf.recovery.config import RestoreConfig


@dataclass(frozen=True)
class LayerError:
    """How far the output of one projection is from its target, before and after.

    ``before`` and ``after`` are ``|T - output| / |T|`` over all calibration tokens, in Frobenius norms.
    """

    layer: int
    projection: str
    inputs: int
    ridge: float
    before: float
    after: float


@dataclass(frozen=True)
class Restoration:
    """The record of a restoration, JSON-ready by `to_dict`.

    Attributes:
        config: settings.
        sparsity: of the level, a fraction (0-1) of the decoder layers' parameters.
        blend: of the targets.
        tokens: that counted.
        calibration: provenance of the text.
        base: id, revision and fingerprint of the unpruned model, as far as known.
        errors: one entry for each projection, in the order of restoration.
        fingerprint: of the changed parameters (`gisp_hf.models.fingerprint`).
        changed: their names.
    """

    config: RestoreConfig
    sparsity: float
    blend: float
    tokens: int
    errors: tuple[LayerError, ...]
    changed: tuple[str, ...]
    fingerprint: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.to_dict(), "errors": [asdict(error) for error in self.errors]}
