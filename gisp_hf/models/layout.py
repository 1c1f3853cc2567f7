"""Structures of a model: kinds, the rows of parameters that belong to each, and their cost.

Notation used throughout: ``L`` decoder layers, ``d`` hidden size, ``I`` intermediate size, ``H`` query heads, ``K``
key/value heads, ``h`` head dimension. A *structure* is removed as a whole: a key/value group with its ``H / K`` query
heads, or one MLP channel; or a whole decoder layer. A *block* is all structures of one kind in one layer.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

Rows = Mapping[str, Sequence[tuple[int, torch.Tensor]]]  # parameter -> (dimension, increasing indices along it)


@dataclass(frozen=True)
class Kind:
    """One kind of structure, as data.

    Attributes:
        name: of the kind, in layouts and files: ``attention``.
        unit, plural: of one structure and several, for tables and messages: ``group``, ``groups``.
        config_keys: keys of a layer's config that change when structures go. The last one counts the structures, the
            others a fixed multiple of them.
        title: of several structures, in full, for cards; ``plural`` if empty.
        whole: whether a structure is a whole decoder layer. Of every other kind a layer keeps one structure at least.
    """

    name: str
    unit: str
    plural: str
    config_keys: tuple[str, ...] = ()
    title: str = ""
    whole: bool = False


# Their order is that of the blocks of a layer, in which ties are broken. Other kinds are added by `register_kind`.
KINDS: dict[str, Kind] = {
    "attention": Kind(
        "attention", "group", "groups", ("num_attention_heads", "num_key_value_heads"), "key/value groups"
    ),
    "query": Kind("query", "query head", "query_heads", ("num_attention_heads",), "query heads"),
    "mlp": Kind("mlp", "channel", "channels", ("intermediate_size",), title="MLP channels"),
    "layer": Kind("layer", "layer", "layers", ("num_hidden_layers",), title="decoder layers", whole=True),
}


def register_kind(kind: Kind) -> None:
    """Adds a kind of structure.

    Raises:
        ValueError: if another kind has its name.
    """
    if KINDS.setdefault(kind.name, kind) != kind:
        raise ValueError(f"kind {kind.name!r} exists already as {KINDS[kind.name]}; choose another name")


def kind_of(name: str) -> Kind:
    """The kind of that name; a plain one for a name that is not registered, as in a file of another program."""
    return KINDS.get(name, Kind(name, name, f"{name} structures"))


@dataclass(frozen=True)
class Member:
    """A part of one parameter that a block's structures share out among themselves.

    Structure ``i`` owns the ``width`` rows from ``offset + i * stride`` on, along dimension ``dim``. Several members
    may lie in one parameter: the three parts of a fused q/k/v projection, or gate and up in one matrix.

    ``stride`` None: structures lie side by side (``stride = width``).
    """

    parameter: str
    dim: int
    width: int
    offset: int = 0
    stride: int | None = None

    def rows(self, structures: torch.Tensor) -> torch.Tensor:
        """Indices along ``dim`` that structures own: (n,) -> (n, width)."""
        starts = self.offset + structures * (self.width if self.stride is None else self.stride)
        return starts[:, None] + torch.arange(self.width, device=structures.device)

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"parameter": self.parameter, "dim": self.dim, "width": self.width}
        facts |= {"offset": self.offset} if self.offset else {}
        return facts | ({} if self.stride is None else {"stride": self.stride})


@dataclass(frozen=True)
class Block:
    """All structures of one kind in one decoder layer.

    ``cost`` is the number of parameters that go with one structure. ``reference_cost`` is the constant by which the
    published code divides its score (`gisp_hf.pruning.normalization`). ``parts``: structures lie side by side in this
    many equal parts, each of which loses as many as the others (query heads: one part for each key/value group).
    """

    layer: int
    kind: str
    size: int
    cost: int
    members: tuple[Member, ...] = ()
    reference_cost: int | None = None
    parts: int = 1

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def module(self) -> str:
        """The smallest module that all members lie in."""
        return os.path.commonprefix([member.parameter for member in self.members]).rpartition(".")[0]

    def to_dict(self) -> dict[str, Any]:
        facts = {"layer": self.layer, "kind": self.kind, "size": self.size, "cost": self.cost}
        facts["members"] = [member.to_dict() for member in self.members]
        facts |= {} if self.reference_cost is None else {"reference_cost": self.reference_cost}
        return facts | ({} if self.parts == 1 else {"parts": self.parts})


@dataclass(frozen=True)
class Layout:
    """Every block of a model, ordered by (layer, kind), and the number of parameters that sparsity is a fraction of.

    ``total`` counts all parameters of the decoder layers, norms included; embeddings, the final norm and the LM head
    are not counted, as in the paper.

    ``plain_sizes``: kind -> the numbers of its structures, increasing, with which the family's own class loads if all
    layers have that number; a kind that is not in it may have any. Known only where layers of one size are asked for
    (`gisp_hf.models.plain`).
    """

    architecture: str
    blocks: tuple[Block, ...]
    total: int
    num_layers: int
    plain_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @property
    def identity(self) -> tuple[Any, ...]:
        """The facts by which two layouts are of the same model. Names and constants may change between versions."""
        sizes = tuple((block.layer, block.kind, block.size, block.cost) for block in self.blocks)
        return self.architecture, self.total, self.num_layers, sizes

    @property
    def kinds(self) -> list[Kind]:
        """The kinds that occur, in the order of a layer's blocks."""
        return [kind_of(name) for name in dict.fromkeys(block.kind for block in self.blocks)]

    @property
    def whole(self) -> bool:
        """Whether its structures are whole layers."""
        return any(kind.whole for kind in self.kinds)

    @property
    def attention_unit(self) -> str:
        """What is removed from attention (`GISPConfig.attention_unit`): ``group`` or ``query``."""
        return "query" if self.of_kind("query") else "group"

    def of_kind(self, name: str) -> list[int]:
        """Numbers of the blocks of one kind, in the order of layers."""
        return [number for number, block in enumerate(self.blocks) if block.kind == name]

    @cached_property
    def _shared(self) -> dict[tuple[str, int], list[tuple[int, Member]]]:
        """(parameter, dimension) -> its members, with the numbers of their blocks."""
        shared: dict[tuple[str, int], list[tuple[int, Member]]] = {}
        for number, block in enumerate(self.blocks):
            for member in block.members:
                shared.setdefault((member.parameter, member.dim), []).append((number, member))
        return shared

    def lengths(self) -> Iterator[tuple[str, int, int]]:
        """(parameter, dimension, length along it) of every dimension that is shared out."""
        for (parameter, dim), members in self._shared.items():
            yield parameter, dim, max(self._end(number, member) for number, member in members)

    def _end(self, number: int, member: Member) -> int:
        return int(member.rows(torch.tensor([self.blocks[number].size - 1])).max()) + 1

    def rows_kept(self, kept: Sequence[torch.Tensor]) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """The rows and columns that stay, for every parameter that loses some and not all.

        Surgery, saving and materialising ask nothing else about a level, but for `renamed` where whole layers go.

        Args:
            kept: per block, the increasing indices of the structures that stay.
        """
        result: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for (parameter, dim), members in self._shared.items():
            if all(len(kept[number]) == self.blocks[number].size for number, _ in members):
                continue
            stays = torch.ones(max(self._end(number, member) for number, member in members), dtype=torch.bool)
            for number, member in members:
                gone = torch.ones(self.blocks[number].size, dtype=torch.bool)
                gone[kept[number]] = False
                stays[member.rows(gone.nonzero().squeeze(1)).flatten()] = False
            if not stays.any():
                continue
            result.setdefault(parameter, []).append((dim, stays.nonzero().squeeze(1)))
        return result

    def renamed(self, kept: Sequence[torch.Tensor]) -> dict[str, str | None]:
        """The names that parameters of whole layers have once some layers go; None for those that go. Else empty.

        The layers that stay are numbered from 0 on.
        """
        names: dict[str, str | None] = {}
        number = 0
        for block, keep in zip(self.blocks, kept):
            if not kind_of(block.kind).whole:
                continue
            module = f"{block.module.rpartition('.')[0]}.{number}"
            for member in block.members:
                rest = member.parameter.removeprefix(block.module)
                names[member.parameter] = module + rest if len(keep) else None
            number += len(keep)
        return names

    def reduced(self, kept: Sequence[torch.Tensor]) -> "Layout":
        """The layout of the model that keeps only these structures, block for block.

        A layer that goes leaves a block of size 0 without members. Blocks keep the numbers of their layers.

        Raises:
            ValueError: if structures of two blocks are interleaved in one parameter and lose different ones.
        """
        new_rows = {(name, dim): rows for name, cuts in self.rows_kept(kept).items() for dim, rows in cuts}

        def moved(member: Member, keep: torch.Tensor) -> Member:
            rows = new_rows.get((member.parameter, member.dim))
            if rows is None:
                return member
            found = torch.searchsorted(rows, member.rows(keep))  # (n, width): where they lie now
            offset = int(found[0, 0])
            stride = int(found[1, 0]) - offset if len(keep) > 1 else None
            result = replace(member, offset=offset, stride=None if stride == member.width else stride)
            if not torch.equal(result.rows(torch.arange(len(keep))), found):
                raise ValueError(f"the structures of {member.parameter} are not evenly spaced once some are removed")
            return result

        blocks, names = [], self.renamed(kept)
        for block, keep in zip(self.blocks, kept):
            members = [moved(member, keep) for member in block.members if len(keep)]
            members = [replace(m, parameter=names.get(m.parameter) or m.parameter) for m in members]
            blocks.append(replace(block, size=len(keep), members=tuple(members)))
        removed = sum((old.size - new.size) * old.cost for old, new in zip(self.blocks, blocks))
        return replace(self, blocks=tuple(blocks), total=self.total - removed)
