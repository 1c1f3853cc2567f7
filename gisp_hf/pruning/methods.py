"""Pruning methods: one row each. Criterion, scope of the ranking, normalisation and number of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gisp_hf.criteria.base import Criterion
from gisp_hf.criteria.block_influence import BlockInfluence
from gisp_hf.criteria.flap import Flap
from gisp_hf.criteria.gate import Gate
from gisp_hf.criteria.magnitude import Magnitude
from gisp_hf.criteria.owl import Owl
from gisp_hf.criteria.random import Random
from gisp_hf.criteria.refit import Refit
from gisp_hf.criteria.taylor import Taylor
from gisp_hf.criteria.tyr import Tyr
from gisp_hf.criteria.wanda import WandaSP


@dataclass(frozen=True)
class Method:
    """How worth becomes an order.

    Attributes:
        criterion: makes the criterion of a run.
        scope: ``model`` ranks all structures in one list; ``layer`` takes the same fraction from every block.
        normalization, num_steps, score_momentum, layout: what `GISPConfig` uses where its own fields are None.
        layer_shares: makes what tells the shares of layers apart, with scope ``layer``; None: equal shares.
        compensation: whether saved levels have biases in the place of the mean output of removed structures. The
            removal order is the same without.
        kinds: names of the kinds of structure that it removes; None: all that the family divides its layers into.
        description: one line for tables and help.

    Raises:
        ValueError: if ``layer_shares`` is given with scope ``model``.
    """

    criterion: Callable[[], Criterion]
    scope: Literal["model", "layer"] = "model"
    normalization: str = "params"
    num_steps: int = 80
    score_momentum: float = 0.0
    kinds: tuple[str, ...] | None = None
    layout: Literal["free", "uniform"] = "free"
    description: str = ""
    layer_shares: Callable[[], Owl] | None = None
    compensation: bool = False

    def __post_init__(self) -> None:
        if self.layer_shares is not None and self.scope != "layer":
            raise ValueError(
                f"layer_shares needs scope='layer', got {self.scope!r}: one ranking has no shares of layers"
            )


METHODS: dict[str, Method] = {
    "gisp": Method(Taylor, description="first-order Taylor, one ranking, many steps (arXiv 2510.18030)"),
    "one-shot": Method(Taylor, num_steps=1, description="the score of gisp, all structures removed at once"),
    "magnitude": Method(Magnitude, num_steps=1, description="mean size of a structure's weights"),
    "random": Method(Random, normalization="none", num_steps=1, description="random structures, fixed seed"),
    "wanda-sp": Method(
        WandaSP,
        scope="layer",
        normalization="none",
        num_steps=1,
        description="|weight| x norm of its input, same share of every layer (arXiv 2306.11695)",
    ),
    "wanda-sp-owl": Method(
        WandaSP,
        scope="layer",
        normalization="none",
        num_steps=1,
        layer_shares=Owl,
        description="wanda-sp, smaller shares of layers with many outliers (arXiv 2310.05175)",
    ),
    # Without a normalisation: dividing by parameters removes far too many heads (docs/ablations.md).
    "gisp-activation": Method(
        Gate, normalization="none", description="|activation x its gradient|^1.25 over tokens, no weight gradients"
    ),
    "gisp-uniform": Method(
        Taylor, layout="uniform", description="as gisp, all layers of one size: levels are plain checkpoints"
    ),
    "flap": Method(
        Flap,
        normalization="none",
        num_steps=1,
        description="variance of inputs x squared weight norm, standardised per block (arXiv 2312.11983)",
    ),
    "flap-compensated": Method(
        Flap,
        normalization="none",
        num_steps=1,
        compensation=True,
        description="flap, and the mean output of removed structures becomes a bias of the saved levels",
    ),
    # As LLM-Pruner (horseee/LLM-Pruner: --taylor param_first, sum, not global), which leaves out the first 3 layers and
    # the last of 32 by default: so do the defaults of protect_first and protect_last.
    "local-taylor": Method(
        Taylor,
        scope="layer",
        num_steps=1,
        description="the score of gisp, same share of every layer, one step (LLM-Pruner, arXiv 2305.11627)",
    ),
    "second-order": Method(
        Refit,
        scope="layer",
        normalization="none",
        num_steps=20,
        description="error of the best re-fit without a structure, same share of every layer (arXiv 2403.12983)",
    ),
    "second-order-tyr": Method(
        Tyr,
        scope="layer",
        normalization="none",
        num_steps=20,
        description="second-order plus the first-order term of the layer's output (arXiv 2503.09657)",
    ),
    "shortgpt": Method(
        BlockInfluence,
        normalization="none",
        num_steps=1,
        kinds=("layer",),
        description="whole layers, by 1 - cosine of a layer's input and output (ShortGPT, arXiv 2403.03853)",
    ),
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
