"""The families that can be pruned, as data.

A new family is a new row here, and its classes in ``modeling_gisp.py`` so that its pruned checkpoints load. A family of
another package is added by `register_family`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from gisp_hf.models import modeling_gisp as gisp


@dataclass(frozen=True)
class Projection:
    """A weight whose rows (``dim=0``, with the bias) or columns (``dim=1``) belong to the structures of a block.

    ``module`` is relative to the decoder layer. ``pieces`` names, for a fused projection, the config keys that its
    parts are in proportion to: ``("intermediate_size", "intermediate_size")`` for gate and up in one matrix. Each part
    is shared out among the structures by itself.
    """

    module: str
    dim: int
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockRow:
    """Where a decoder layer keeps the structures of one kind.

    Attributes:
        kind: name of the kind (`gisp_hf.models.layout.KINDS`).
        projections: the weights that go with a structure.
        counted: the projection whose length, along its ``dim``, tells the number of structures.
        per: ``(module, attribute)`` that holds the length of one structure there; None: 1.
        attributes: ``(module, attribute)`` pairs that hold the number of structures (in one part, if there are
            several) and follow when it changes.
        parts: the projection whose length tells the number of parts, each of which loses as many structures as the
            others; None: one part.
        reference: (rows of the first projection per structure, structures, hidden size) -> the constant by which the
            published code divides; None: the number of parameters.
    """

    kind: str
    projections: tuple[Projection, ...]
    counted: Projection
    per: tuple[str, str] | None = None
    attributes: tuple[tuple[str, str], ...] = ()
    reference: Callable[[int, int, int], int] | None = None
    parts: Projection | None = None


@dataclass(frozen=True)
class Family:
    """The classes of a family, and where its decoder layers keep what can be removed."""

    model_type: str
    model_class: str
    pruned_config: type[PreTrainedConfig]
    pruned_model: type[PreTrainedModel]
    layers: str = "model.layers"
    blocks: tuple[BlockRow, ...] = ()

    @property
    def plain_model(self) -> type[PreTrainedModel]:
        """The family's own class, for models whose layers are of one size."""
        return next(cls for cls in self.pruned_model.__mro__ if cls.__name__ == self.model_class)

    @property
    def plain_config(self) -> type[PreTrainedConfig]:
        """The config class of ``plain_model``."""
        found = self.plain_model.config_class
        assert found is not None
        return found

    def rows(self, attention_unit: str = "group") -> tuple[BlockRow, ...]:
        """The rows of blocks, with query heads in place of key/value groups if ``attention_unit`` is ``query``.

        Raises:
            ValueError: if the family keeps its attention otherwise than in separate projections.
        """
        if attention_unit == "group":
            return self.blocks
        if ATTENTION not in self.blocks:
            raise ValueError(
                f"{self.model_class} has no separate query projection with the usual names, which "
                f"attention_unit={attention_unit!r} needs; use attention_unit='group'"
            )
        return tuple(QUERY if row == ATTENTION else row for row in self.blocks)


ATTENTION = BlockRow(
    kind="attention",
    projections=(
        Projection("self_attn.q_proj", 0),
        Projection("self_attn.k_proj", 0),
        Projection("self_attn.v_proj", 0),
        Projection("self_attn.o_proj", 1),
    ),
    counted=Projection("self_attn.k_proj", 0),
    per=("self_attn", "head_dim"),
    reference=lambda width, size, hidden: 4 * width * hidden,  # 4 * h * d for each query head
)
# In place of `ATTENTION`: as many query heads from each key/value group; keys and values stay.
QUERY = BlockRow(
    kind="query",
    projections=(Projection("self_attn.q_proj", 0), Projection("self_attn.o_proj", 1)),
    counted=Projection("self_attn.q_proj", 0),
    per=("self_attn", "head_dim"),
    attributes=(("self_attn", "num_key_value_groups"),),
    reference=lambda width, size, hidden: 4 * width * hidden,
    parts=Projection("self_attn.k_proj", 0),
)
MLP = BlockRow(
    kind="mlp",
    projections=(Projection("mlp.gate_proj", 0), Projection("mlp.up_proj", 0), Projection("mlp.down_proj", 1)),
    counted=Projection("mlp.down_proj", 1),
    attributes=(("mlp", "intermediate_size"),),
    reference=lambda width, size, hidden: 3 * size,  # 3 * I, not 3 * d
)
SEPARATE = (ATTENTION, MLP)  # separate q/k/v/o and gate/up/down projections

# Llama also covers SmolLM, SmolLM2 and DeepSeek-R1-Distill-Llama.
FAMILIES: list[Family] = [
    Family("llama", "LlamaForCausalLM", gisp.GispLlamaConfig, gisp.GispLlamaForCausalLM, blocks=SEPARATE),
    Family("mistral", "MistralForCausalLM", gisp.GispMistralConfig, gisp.GispMistralForCausalLM, blocks=SEPARATE),
    Family("qwen2", "Qwen2ForCausalLM", gisp.GispQwen2Config, gisp.GispQwen2ForCausalLM, blocks=SEPARATE),
    Family("qwen3", "Qwen3ForCausalLM", gisp.GispQwen3Config, gisp.GispQwen3ForCausalLM, blocks=SEPARATE),
    Family("gemma2", "Gemma2ForCausalLM", gisp.GispGemma2Config, gisp.GispGemma2ForCausalLM, blocks=SEPARATE),
    Family("gemma3_text", "Gemma3ForCausalLM", gisp.GispGemma3TextConfig, gisp.GispGemma3ForCausalLM, blocks=SEPARATE),
]


def register_family(family: Family) -> None:
    """Adds a family, after those that exist.

    Raises:
        ValueError: if its model type and class are taken, or a kind of its blocks is unknown.
    """
    taken = {(known.model_type, known.model_class) for known in FAMILIES}
    if (family.model_type, family.model_class) in taken:
        raise ValueError(f"the family {family.model_class} ({family.model_type}) exists already")
    FAMILIES.append(family)
