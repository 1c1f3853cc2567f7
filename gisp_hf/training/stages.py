"""Stages: steps that each level goes through once it is reached.

Saving, evaluating and publishing are stages (``levels/stage.py``, ``evaluation/stage.py``, ``hub/stage.py``). One of
your own is a subclass of `Stage` in ``GISPPruner(stages=[...])``; it comes after evaluation and before publishing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gisp_hf.pruning.trajectory import Trajectory


@dataclass(frozen=True)
class Run:
    """Facts of a run that stages need.

    Attributes:
        output_dir: the folder of the levels.
        shared_dir: whether other files than ours may lie there (the Trainer's own output folder).
        main_process: whether this process writes and talks.
        resumed: whether the run goes on from a checkpoint, so that levels may exist already.
        sliced: whether the model loses structures for real during the run; otherwise they are zeros.
        gated: whether they are zeros in the activations, since the model is quantized or has adapters. Its weights are
            not those of the levels then.
        sharded: whether parameters are cut over the processes, so that all of them must take part in saving.
        use_cache: of the model's config before the Trainer changed it; None if unknown.
        trajectory: base, settings and calibration data; its order is empty, or that of the checkpoint.
        model: unpruned, or with what the checkpoint says is gone set to zero, if it is sharded.
        dataloader: of the calibration data, as the Trainer has made it; None if unknown.
    """

    output_dir: Path
    shared_dir: bool
    main_process: bool
    resumed: bool
    sliced: bool
    gated: bool
    sharded: bool
    use_cache: bool | None
    tokenizer: Any
    trajectory: Trajectory
    model: PreTrainedModel
    dataloader: Any = None


@dataclass(frozen=True)
class Level:
    """One nested model of a run, on its way through the stages.

    Attributes:
        sparsity: as asked for, a fraction (0-1) of the decoder layers' parameters.
        trajectory: the removal order up to this level, and no further.
        model: in the middle of the run; stages only read it.
        folder: where the level is, or will be, as a checkpoint.
        changed: names of parameters whose values in ``folder`` are not the base model's any more.
        metrics: name -> number; None for one that is not finite.
    """

    sparsity: float
    trajectory: Trajectory
    model: PreTrainedModel
    folder: Path
    changed: frozenset[str] = frozenset()
    metrics: Mapping[str, float | None] = field(default_factory=dict)


class Stage:
    """One thing that is done to each level. Every process runs every stage."""

    def begin(self, run: Run) -> None:
        """Refuses impossible requests, before anything is computed."""
        self.run = run

    def __call__(self, level: Level) -> Level:
        """Does it, and returns the level with what was learned or changed."""
        return level

    def finish(self, trajectory: Trajectory, levels: Mapping[float, Level]) -> None:
        """After the last level of a run that came to its end."""
