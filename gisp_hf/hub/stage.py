"""The stage that publishes: each level with its card during the run, ``main`` at its end."""

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from gisp_hf.atomic import write_text_atomic
from gisp_hf.config import level_name
from gisp_hf.hub.plan import CARD_FILE
from gisp_hf.hub.push import LevelUploader, PushReport
from gisp_hf.hub.run_cards import card_writer
from gisp_hf.levels.info import read_levels
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.report.html import report_writer
from gisp_hf.training.stages import Level, Run, Stage


class Publish(Stage):
    """Writes each level's card into its folder and uploads the folder in the background.

    Args:
        repo_id: ``name``, ``user/name`` or ``organisation/name``; created if it does not exist.
        private: whether a new repository is private; the Hub's own default if None.
        token: one that may write; the one you are logged in with if None.
        replace: overwrite a repository that holds another run.

    Attributes:
        report: what the Hub has confirmed, after the run.

    Raises:
        ValueError, PushError: when the run begins, if the repository cannot be written to; at its end, if a push
            failed for good: the levels are safe in their folders, and another push goes on from there.
    """

    def __init__(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, replace: bool = False
    ) -> None:
        self.repo_id, self.private, self.token, self.replace = repo_id, private, token, replace
        self.report: PushReport | None = None
        self.uploader: LevelUploader | None = None
        self._asked = False

    def begin(self, run: Run) -> None:
        super().begin(run)
        if run.main_process:
            self.uploader = LevelUploader(
                self.repo_id, private=self.private, token=self.token, run=run.trajectory, replace=self.replace
            )

    def __call__(self, level: Level) -> Level:
        """Returns at once; what fails is tried again by ``finish``."""
        if self.uploader is not None:
            levels = read_levels(level.folder.parent)
            folder = level.folder.parent
            asked, self._asked = self._asked, True  # for the license of the base model: once is enough
            card = card_writer(folder, levels, repo_id=self.uploader.repo_id, fetch=not asked, new=True)
            write_text_atomic(level.folder / CARD_FILE, card(level_name(level.sparsity), []))
            self.uploader.submit(level.sparsity, level.folder)
        return level

    def finish(self, trajectory: Trajectory, levels: Mapping[float, Level]) -> None:
        """Waits for the levels, does what is missing, writes ``main``, and has everything confirmed by the Hub."""
        if self.uploader is None:
            return
        folder: Path = self.run.output_dir
        card = card_writer(folder, read_levels(folder), repo_id=self.uploader.repo_id)
        self.report = self.uploader.finish(folder, card=card, report=report_writer(folder, self.uploader.repo_id))
        tqdm.write(f"GISP: {len(levels)} levels and main are at {self.report.url}")
