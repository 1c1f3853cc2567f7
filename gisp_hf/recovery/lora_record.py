"""The record of a recovery: ``recovery.json`` in a level's folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from gisp_hf.recovery.record import FORMAT, Record
from gisp_hf.untrusted import check_list, check_number, check_object, check_text, check_whole

RECOVERY_FILE = "recovery.json"
TRAINED = ("lora", "norms", "scales")
OBJECTIVES = ("language_modeling", "distillation")


@dataclass(frozen=True)
class Recovery(Record):
    """The record of a recovery, JSON-ready by `to_dict`.

    Attributes:
        objective: one of `OBJECTIVES`.
        lora: settings of the adapters: rank, modules ...; empty if none were trained.
        training: settings of the Trainer: learning rate, batch size, seed ...
        steps: optimizer steps that were made.
        tokens: input tokens that were seen, of all processes; a token counts each time.
        seconds: of training.
        loss: mean of the whole training, in nats per token.
        restored: whether the output projections were fitted anew before (`gisp_hf.recovery.record`).
        changed: names of the parameters that differ from those of the level before.
        fingerprint: of the changed parameters (`gisp_hf.models.fingerprint`).
        teacher: class, name and fingerprint; empty for language modelling.
        data: provenance of the text.
        base: id, revision and fingerprint of the unpruned model.
        train: one of `TRAINED`.
    """

    file = RECOVERY_FILE
    verb = "recover"

    objective: str
    lora: Mapping[str, Any]
    training: Mapping[str, Any]
    steps: int
    tokens: int
    seconds: float
    loss: float
    restored: bool
    changed: tuple[str, ...]
    fingerprint: str
    teacher: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    train: str = "lora"

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "changed": list(self.changed)}

    @classmethod
    def checked(cls, facts: dict[str, Any]) -> Self:
        if facts["objective"] not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if facts.get("train", "lora") not in TRAINED:
            raise ValueError(f"train must be one of {', '.join(TRAINED)}")
        for key in ("lora", "training", "teacher", "data", "base"):
            check_object(facts[key], key)
        for key in ("steps", "tokens"):
            check_whole(facts[key], key)
        check_number(facts["seconds"], "seconds", least=0)
        check_number(facts["loss"], "loss")
        if type(facts["restored"]) is not bool:
            raise ValueError("restored must be true or false")
        check_text(facts["fingerprint"], "fingerprint")
        changed = [check_text(name, "changed") for name in check_list(facts["changed"], "changed", longest=10**5)]
        return cls(**{**facts, "changed": tuple(changed)})


def is_recovered(folder: str | Path) -> bool:
    """Whether a level's folder says that it was trained after pruning."""
    return (Path(folder) / RECOVERY_FILE).is_file()
