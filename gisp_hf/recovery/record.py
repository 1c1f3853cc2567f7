"""Records in a level's folder: what they have in common, and that of a restoration, ``restoration.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from gisp_hf.atomic import write_text_atomic
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.untrusted import check_list, check_number, check_object, check_text, check_whole, read_json

RESTORATION_FILE = "restoration.json"
FORMAT = 1


class Record:
    """A JSON file in a level's folder that says what was done to it. A subclass names the file and checks its facts."""

    file: ClassVar[str]
    verb: ClassVar[str]  # what to do again if the file is damaged

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the format."""
        raise NotImplementedError

    @classmethod
    def checked(cls, facts: dict[str, Any]) -> Self:
        """From a file's facts without their format. Raises KeyError, TypeError or ValueError if they are damaged."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Writes the file into a level's folder."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_text_atomic(Path(folder) / self.file, text)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what ``save`` wrote, and trusts none of it before it is checked.

        Raises:
            FileNotFoundError: if the level has no such file.
            ValueError: if the file is damaged.
        """
        path = Path(folder) / cls.file
        try:
            facts = read_json(path)
            if facts.pop("format", None) != FORMAT:
                raise ValueError(f"this version of gisp_hf reads format {FORMAT}")
            return cls.checked(facts)
        except FileNotFoundError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be used: {error}; {cls.verb} the level again") from error


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
class Restoration(Record):
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

    file = RESTORATION_FILE
    verb = "restore"

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
        facts = {**asdict(self), "config": self.config.to_dict(), "changed": list(self.changed)}
        return {"format": FORMAT, **facts, "errors": [asdict(error) for error in self.errors]}

    @classmethod
    def checked(cls, facts: dict[str, Any]) -> Self:
        check_number(facts["sparsity"], "sparsity", least=0, most=1)
        check_number(facts["blend"], "blend", least=0, most=1)
        check_whole(facts["tokens"], "tokens")
        check_text(facts["fingerprint"], "fingerprint")
        check_object(facts["base"], "base")
        check_object(facts["calibration"], "calibration")
        changed = [check_text(name, "changed") for name in check_list(facts["changed"], "changed", longest=10**5)]
        config = RestoreConfig(**check_object(facts["config"], "config"))
        entries = [check_object(e, "errors") for e in check_list(facts["errors"], "errors", longest=10**5)]
        errors = tuple(_checked_error(entry) for entry in entries)
        return cls(**{**facts, "config": config, "errors": errors, "changed": tuple(changed)})


def is_restored(folder: str | Path) -> bool:
    """Whether a level's folder says that it was restored."""
    return (Path(folder) / RESTORATION_FILE).is_file()


def _checked_error(entry: Mapping[str, Any]) -> LayerError:
    check_whole(entry["layer"], "layer")
    check_text(entry["projection"], "projection")
    check_whole(entry["inputs"], "inputs")
    for key in ("ridge", "before", "after"):
        check_number(entry[key], key, least=0)
    return LayerError(**entry)
