"""The stage that saves each level as a checkpoint."""

from gisp_hf.levels.save import check_output_folder, save_level
from gisp_hf.training.stages import Level, Run, Stage


class Save(Stage):
    """Writes each level into its folder."""

    def begin(self, run: Run) -> None:
        super().begin(run)
        if run.main_process and not run.resumed:
            check_output_folder(run.output_dir, may_hold_others=run.shared_dir)

    def __call__(self, level: Level) -> Level:
        run = self.run
        if run.main_process or run.sharded:
            save_level(
                level.model,
                level.folder,
                trajectory=level.trajectory,
                sliced=run.sliced,
                tokenizer=run.tokenizer,
                use_cache=run.use_cache,
                main_process=run.main_process,
                replace=run.resumed,  # a level saved after the checkpoint, by the run that was killed
            )
        return level
