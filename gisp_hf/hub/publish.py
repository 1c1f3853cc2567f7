"""Levels and their cards to the Hub while a run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gisp_hf.config import level_name
from gisp_hf.hub import LevelInfo, LevelUploader, PushReport, read_levels
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.pruning.trajectory import Trajectory

CARD_FILE = "README.md"


class Publisher:
    """Writes each level's card into its folder and uploads the folder in the background.

    Args:
        repo_id: ``name``, ``user/name`` or ``organisation/name``; created if it does not exist.
        private: whether a new repository is private; the Hub's own default if None.
        token: one that may write; the one you are logged in with if None.

    Raises:
        ValueError, PushError: if the repository cannot be written to, before anything is computed.
    """

    def __init__(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
        self.uploader = LevelUploader(repo_id, private=private, token=token)

    def add_level(
        self, level: float, folder: Path, *, trajectory: Trajectory, metrics: Mapping[float, Mapping[str, float]]
    ) -> None:
        """Returns at once; what fails is tried again by ``finish``."""
        info = next(info for info in read_levels(folder.parent) if info.name == level_name(level))
        info = replace(info, metrics=dict(metrics.get(level, {})))
        text = level_card(trajectory, info, repo_id=self.uploader.repo_id)
        temporary = folder / f"{CARD_FILE}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / CARD_FILE)
        self.uploader.submit(level, folder)

    def finish(
        self, folder: Path, *, trajectory: Trajectory, metrics: Mapping[float, Mapping[str, float]]
    ) -> PushReport:
        """Waits for the levels, does what is missing, writes ``main``, and has everything confirmed by the Hub.

        Raises:
            PushError: if that cannot be done; the levels are safe in ``folder``, and another push goes on from there.
        """

        def card(branch: str, levels: Sequence[LevelInfo]) -> str | None:
            if branch != "main":
                return None  # it lies in the level's folder
            return main_card(trajectory, levels, repo_id=self.uploader.repo_id)

        return self.uploader.finish(folder, card=card, metrics=metrics)
