"""What can be removed from a model: structures, the parameters that belong to them, and what they cost.

Notation used throughout: ``L`` decoder layers, ``d`` hidden size, ``I`` intermediate size, ``H`` query heads, ``K``
key/value heads, ``h`` head dimension. A *structure* is what is removed as a whole: a key/value group with its
``H / K`` query heads, or one MLP channel. A *block* is all structures of one kind in one layer.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")  # also the order in which ties are broken


@dataclass(frozen=True)
class Member:
    """One parameter that a block's structures share out among themselves.

    Structure ``i`` owns the slice ``[i * width, (i + 1) * width)`` of dimension ``dim`` of the parameter.
    """

    parameter: str
    dim: int
    width: int


@dataclass(frozen=True)
class Block:
    """All structures of one kind in one decoder layer.

    ``cost`` is the number of parameters that go with one structure. ``reference_cost`` is the constant by which the
    published code divides its score (see ``scoring.normalizer``).
    """

    layer: int
    kind: Kind
    size: int
    cost: int
    reference_cost: int
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class Layout:
    """Every block of a model, ordered by (layer, kind), and the number of parameters that sparsity is a fraction of.

    ``total`` counts all parameters of the decoder layers, norms included; embeddings, the final norm and the LM head
    are not counted, as in the paper.
    """

    architecture: str
    blocks: tuple[Block, ...]
    total: int
    num_layers: int
