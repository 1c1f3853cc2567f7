"""Pruning methods: one row each. Criterion, scope of the ranking, normalisation and number of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gisp_hf.criteria.base import Criterion
from gisp_hf.criteria.magnitude import Magnitude
from gisp_hf.criteria.random import Random
from gisp_hf.criteria.taylor import Taylor


@dataclass(frozen=True)
class Method:
    """How worth becomes an order.

    Attributes:
        criterion: makes the criterion of a run.
        scope: ``model`` ranks all structures in one list; ``layer`` takes the same fraction from every block.
        normalization, num_steps: what `GISPConfig` uses where its own fields are None.
        description: one line for tables and help.
    """

    criterion: Callable[[], Criterion]
    scope: Literal["model", "layer"] = "model"
    normalization: str = "params"
    num_steps: int = 80
    description: str = ""


METHODS: dict[str, Method] = {
    "gisp": Method(Taylor, description="first-order Taylor, one ranking, many steps (arXiv 2510.18030)"),
    "one-shot": Method(Taylor, num_steps=1, description="the score of gisp, all structures removed at once"),
    "magnitude": Method(Magnitude, num_steps=1, description="mean size of a structure's weights"),
    "random": Method(Random, normalization="none", num_steps=1, description="random structures, fixed seed"),
}


def register_method(name: str, method: Method) -> None:
    """Adds a method, for ``GISPConfig(method=name)``.

    Raises:
        ValueError: if another method has that name.
    """
    if METHODS.setdefault(name, method) != method:
        raise ValueError(f"method {name!r} exists already; choose another name")


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: if there is none, with the names there are.
    """
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {name!r}; a method of another package must be added by "
            "gisp_hf.pruning.methods.register_method first"
        )
    return METHODS[name]
