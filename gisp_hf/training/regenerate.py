"""Calibration by own answers, given anew by the pruned model as it shrinks."""

from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gisp_hf.data.self_answers import AnsweredPrompts, read_answers, write_answers
from gisp_hf.models.wrapped import bare_model
from gisp_hf.training.callback import PruningCallback
from gisp_hf.training.distributed import from_first_rank, will_shard
from gisp_hf.upstream import handler_of


class RegenerateAnswers(TrainerCallback):
    """Lets the model in the middle of a run answer the calibration prompts anew, each time that it has lost so much.

    ::

        calibration = load_calibration("prompts.jsonl", tokenizer, objective="self", model=model)
        pruner = GISPPruner(GISPConfig(method="gisp-activation"))
        Trainer(..., callbacks=[pruner, RegenerateAnswers(pruner, calibration.dataset)])

    Without this callback the answers of the unpruned model stay. A step of the Trainer may have one batch in hand
    already when answers change; where a step is the whole data set, it has none.

    With ``folder``, each set of answers is written there, and a run that goes on after a kill reads the last one.

    With several processes the first one generates, and the others wait for its answers: ``ddp_timeout`` must allow it.

    Args:
        pruner: of the same Trainer; None takes the one that the Trainer has when training begins, which
            `gisp_hf.prune` adds.
        answers: the Trainer's data set.
        every: sparsity between two sets of answers, a fraction (0-1) of the decoder layers' parameters.
        folder: where sets are kept; None keeps none, and then a run cannot be resumed beyond the first new set.

    Raises:
        ValueError: if ``every`` is not in (0, 1); when training begins, if FSDP shards the model, the Trainer has no
            GISPPruner, or a run goes on and its answers are not in ``folder``.
    """

    def __init__(
        self,
        pruner: PruningCallback | None,
        answers: AnsweredPrompts,
        *,
        every: float = 0.1,
        folder: str | Path | None = None,
    ) -> None:
        if not 0 < every < 1:
            raise ValueError(f"every must lie in (0, 1), got {every:g}; each tenth of the parameters is 0.1")
        self._pruner = pruner
        self.data = answers
        self.every = every
        self.folder = None if folder is None else Path(folder)
        self.done = 0  # sets of new answers so far

    @property
    def pruner(self) -> PruningCallback:
        assert self._pruner is not None, "training has not begun"
        return self._pruner

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._pruner is None:
            handler = handler_of(self)
            found = [] if handler is None else [cb for cb in handler.callbacks if isinstance(cb, PruningCallback)]
            if not found:
                raise ValueError(
                    "the Trainer of RegenerateAnswers has no GISPPruner; start it by gisp_hf.prune(trainer), or put a "
                    "GISPPruner into callbacks=[...] before it"
                )
            self._pruner = found[0]
        if will_shard(args, model):
            raise ValueError(
                "RegenerateAnswers lets one process generate, and FSDP shards the model over all of them; use DDP or a "
                "single process, or leave it out, which keeps the answers of the unpruned model"
            )
        if state.global_step:
            self._go_on()

    def _go_on(self) -> None:
        self.done = self._due()
        if self.done:
            path = self._path(self.done)
            found = None if path is None else read_answers(path, self._provenance(self.done))
            if found is None:
                raise ValueError(
                    f"the run goes on at sparsity {self.pruner.engine.sparsity:.4f}, and the answers given at "
                    f"{self.done * self.every:g} are not in {self.folder}; give the same folder as before, or "
                    "begin anew"
                )
            self.data.take(found, sparsity=self.done * self.every)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        due = self._due()
        if due <= self.done or control.should_training_stop:
            return
        self.done = due
        sparsity = self.pruner.engine.sparsity
        first = state.is_world_process_zero
        answers = self.data.generate(bare_model(model)) if first else [[] for _ in self.data.prompts]
        self.data.take(from_first_rank(answers, device=args.device), sparsity=sparsity)
        if not first:
            return
        if (path := self._path(due)) is not None:
            write_answers(path, self.data.answers, self._provenance(due))
        tqdm.write(f"GISP: the model at sparsity {sparsity:.4f} has answered {len(self.data)} prompts anew")

    def _due(self) -> int:
        return int(self.pruner.engine.sparsity / self.every + 1e-9)

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"answers-{number * self.every:.4f}.json"

    def _provenance(self, number: int) -> dict[str, Any]:
        settings = self.data.settings
        return {
            "sparsity": round(number * self.every, 6),
            "base": self.pruner.trajectory.base.fingerprint,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": self.data.seed,
        }
