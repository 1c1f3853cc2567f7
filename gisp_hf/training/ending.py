"""The model that a run leaves behind: what it has lost, its class and its config agree."""

import logging

from transformers import PreTrainedModel

from gisp_hf.models import discover
from gisp_hf.models.surgery import CUT_IN_MEMORY, as_pruned_model
from gisp_hf.pruning.engine import Engine

logger = logging.getLogger(__name__)


def describe(model: PreTrainedModel, engine: Engine) -> None:
    """Gives a model that has lost structures the class and config that say so; an unchanged one stays as it is.

    One with zeros in their place keeps its class and config, which describe its sizes; it is not its base any more.
    """
    if not engine.shrink:
        if engine.length and engine.gates is None:
            CUT_IN_MEMORY.add(model)
        return
    try:
        found = discover(model, [kind.name for kind in engine.layout.kinds])  # read off the weights, as they are
    except ValueError as error:  # interrupted between two parameters of one block
        logger.warning("the model was interrupted while structures were sliced out; load it anew (%s)", error)
        return
    sizes = [block.size for block in found.blocks]
    if sizes != [block.size for block in engine.layout.blocks]:
        as_pruned_model(model, engine.layout, sizes)


def slice_zeros(model: PreTrainedModel, engine: Engine, *, wrapped: bool, main_process: bool) -> None:
    """Slices out what a finished run has set to zero, so that ``trainer.save_model()`` writes the pruned model.

    Args:
        wrapped: whether something else holds the parameters (DDP, FSDP2), or the zeros were asked for: they stay, and a
            warning says so.
    """
    if engine.shrink or not engine.length or engine.gates is not None:
        return
    if not wrapped:
        engine.slice_zeros()
        describe(model, engine)
    elif main_process:
        logger.warning(
            "the model that the Trainer holds has its full size, with zeros for what was removed, and "
            "trainer.save_model() would write it so; the saved levels are sliced"
        )
