"""The stage that saves each level as a checkpoint."""

from gisp_hf.levels.save import check_output_folder, save_level
from gisp_hf.levels.unpruned import Unpruned
from gisp_hf.training.stages import Level, Run, Stage


class Save(Stage):
    """Writes each level into its folder.

    Args:
        unpruned: the files to cut levels out of, where the model of the run has gates.
    """

    def __init__(self, unpruned: Unpruned | None = None) -> None:
        self.unpruned = unpruned

    def begin(self, run: Run) -> None:
        super().begin(run)
        if run.main_process and not run.resumed:
            check_output_folder(run.output_dir, may_hold_others=run.shared_dir)

    def __call__(self, level: Level) -> Level:
        run = self.run
        replace = run.resumed  # a level saved after the checkpoint, by the run that was killed
        if run.gated:
            assert self.unpruned is not None, "a run with gates cannot save its own weights"
            if run.main_process:
                self.unpruned.save_level(
                    level.trajectory, level.folder, tokenizer=run.tokenizer, use_cache=run.use_cache, replace=replace
                )
        elif run.main_process or run.sharded:
            save_level(
                level.model,
                level.folder,
                trajectory=level.trajectory,
                sliced=run.sliced,
                tokenizer=run.tokenizer,
                use_cache=run.use_cache,
                main_process=run.main_process,
                replace=replace,
            )
        return level
