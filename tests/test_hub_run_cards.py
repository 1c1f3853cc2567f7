"""The cards of a run are the same, whether they are written while it goes on or from its folder afterwards."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import httpx
from transformers import __version__ as transformers_version

from gisp_hf.hub import PushReport, read_levels, write_metrics
from gisp_hf.hub import run_cards as module
from gisp_hf.hub.run_cards import card_writer
from gisp_hf.pruning.trajectory import Trajectory
from tests.hub_server import HubServer
from tests.runs import LEVELS, prune
from tests.test_hub_push import NAMES, REPO, TOKENS, contents, push, uploader
from tests.tiny import tiny_model

# The client's own, in the upload of every LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without cards, with a number for every level."""
    folder = tmp_path_factory.mktemp("run")
    prune(tiny_model(), folder)
    for name in NAMES:
        write_metrics(folder / "levels" / name, {"zeta": 1.5, "alpha": float(name[-4:])})
    return folder / "levels"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


def push_from_inside(hub: HubServer, saved: Path, folder: Path) -> PushReport:
    """One level after the other appears in ``folder``, gets its card, and goes up; the trajectory comes last."""
    background = uploader(hub)
    for level, name in zip(LEVELS, NAMES):
        shutil.copytree(saved / name, folder / name)
        card = card_writer(folder, read_levels(folder), repo_id=REPO)(name, [])
        (folder / name / "README.md").write_text(card, encoding="utf-8")
        background.submit(level, folder / name)
    for path in saved.glob("trajectory.*"):
        shutil.copy(path, folder)
    return background.finish(folder, card=card_writer(folder, read_levels(folder), repo_id=REPO))


def test_push_after_a_push_from_inside_changes_nothing(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    first = push_from_inside(hub, saved, tmp_path / "run")
    before = hub.branches(REPO)
    report = push(
        hub, tmp_path / "run", card=card_writer(tmp_path / "run", read_levels(tmp_path / "run"), repo_id=REPO)
    )
    assert report.sent == () and report.commits == first.commits and hub.branches(REPO) == before


def test_cards_from_inside_equal_those_of_the_finished_folder(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    push_from_inside(hub, saved, tmp_path / "run")
    assert not (saved / NAMES[0] / "README.md").exists()
    later = card_writer(saved, read_levels(saved), repo_id=REPO)
    for name in NAMES:
        assert hub.files(REPO, name)["README.md"] == later(name, []).encode()
    assert hub.files(REPO)["README.md"] == later("main", read_pushed(hub, saved)).encode()


def read_pushed(hub: HubServer, saved: Path) -> list:
    return [replace(level, commit=hub.head(REPO, level.name)) for level in read_levels(saved)]


def test_cards_name_the_version_that_saved_the_level(saved: Path) -> None:
    writer = card_writer(saved, read_levels(saved), repo_id=REPO)
    for branch in (*NAMES, "main"):
        assert f"- versions: transformers {transformers_version}\n" in writer(branch, read_levels(saved))


def test_card_of_a_level_does_not_depend_on_the_others(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(saved / NAMES[1], alone / NAMES[1])
    whole = card_writer(saved, read_levels(saved), repo_id=REPO)
    assert card_writer(alone, read_levels(alone), repo_id=REPO)(NAMES[1], []) == whole(NAMES[1], [])


def test_card_in_the_folder_is_kept(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / "README.md").write_text("my own card")
    (folder / NAMES[0] / "README.md").write_text("my own level card")
    levels = read_levels(folder)
    kept = card_writer(folder, levels, repo_id=REPO)
    assert (kept("main", levels), kept(NAMES[0], levels)) == ("my own card", "my own level card")


@pytest.mark.parametrize("options", [{"new": True}, {"license": "mit"}])
def test_new_card_is_written_if_asked(saved: Path, tmp_path: Path, options: dict) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / NAMES[0] / "README.md").write_text("my own level card")
    levels = read_levels(folder)
    text = card_writer(folder, levels, repo_id=REPO, **options)(NAMES[0], levels)
    assert text.startswith("---\n") and ("license: mit" in text) == ("license" in options)


def test_base_card_is_looked_for_only_if_allowed_and_needed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def missing(repo_id: str, *args: object, **options: object) -> str:
        asked.append(repo_id)
        response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
        raise RepositoryNotFoundError("no", response=response)

    monkeypatch.setattr(module, "hf_hub_download", missing)
    folder = renamed(saved, tmp_path / "run", base="org/tiny")
    levels = read_levels(folder)
    for path in (folder, *(folder / name for name in NAMES)):
        card_writer(folder, levels, repo_id=REPO)
        card_writer(folder, levels, repo_id=REPO, fetch=True, license="mit")
        assert asked == []
        (path / "README.md").write_text("mine")
    card_writer(folder, levels, repo_id=REPO, fetch=True)
    assert asked == []
    card_writer(folder, levels, repo_id=REPO, fetch=True, new=True)  # a base that is not there is no error
    assert asked == ["org/tiny"]


def renamed(saved: Path, folder: Path, *, base: str) -> Path:
    """A copy of a run whose base model has another id."""
    shutil.copytree(saved, folder)
    for path in (folder, *(folder / name for name in NAMES)):
        trajectory = Trajectory.load(path)
        replace(trajectory, base=replace(trajectory.base, id=base)).save(path)
    return folder


@pytest.mark.parametrize("base", ["LlamaForCausalLM", "/home/me/model"])
def test_local_name_of_a_base_is_not_asked_for(
    saved: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    base = str(tmp_path / "home") if "/" in base else base
    monkeypatch.setattr(module, "hf_hub_download", lambda *args, **options: pytest.fail(f"asked for {args}"))
    folder = renamed(saved, tmp_path / "run", base=base)
    card_writer(folder, read_levels(folder), repo_id=REPO, fetch=True)


def test_nothing_but_the_card_is_written(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    push_from_inside(hub, saved, tmp_path / "run")
    for name in NAMES:
        changed = {**contents(tmp_path / "run" / name)}
        del changed["README.md"]
        assert changed == contents(saved / name)
