"""A push refuses levels that changed, were swapped or hold links, before the Hub hears of it; other files stay here."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gisp_hf.levels.manifest import MANIFEST_FILE, write_manifest
from tests.hub_server import HubServer
from tests.runs import LEVELS, prune
from tests.test_hub_push import EMPTY, NAMES, REPO, TOKENS, contents, make_run, push, uploader
from tests.tiny import tiny_blocks, tiny_model

# The client's own, in the upload of every LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose levels have manifests."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    for name in NAMES:
        write_manifest(folder / name)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


def refused(hub: HubServer, run: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        push(hub, run)
    assert hub.requests == []


def remove_manifests(run: Path) -> None:
    for name in NAMES:
        (run / name / MANIFEST_FILE).unlink(missing_ok=True)


# Levels that are not as they were saved


def test_level_goes_up_with_its_manifest_and_main_without(hub: HubServer, run: Path) -> None:
    push(hub, run)
    for name in NAMES:
        assert hub.files(REPO, name) == {**EMPTY, **contents(run / name)}
    assert MANIFEST_FILE in hub.files(REPO, NAMES[0]) and MANIFEST_FILE not in hub.files(REPO)


def test_run_of_an_earlier_version_goes_up_without_manifests(hub: HubServer, run: Path) -> None:
    remove_manifests(run)
    push(hub, run)
    for name in NAMES:
        assert hub.files(REPO, name) == {**EMPTY, **contents(run / name)}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(("one", "other"), [(0, 3), (1, 2)])
def test_swapped_folders_are_refused(hub: HubServer, run: Path, one: int, other: int, with_manifest: bool) -> None:
    if not with_manifest:
        remove_manifests(run)
    (run / NAMES[one]).rename(run / "aside")
    (run / NAMES[other]).rename(run / NAMES[one])
    (run / "aside").rename(run / NAMES[other])
    refused(hub, run, f"{run / NAMES[one]} holds a level of sparsity 0.{'54'[one]}.* does not fit its name")


def test_other_weights_are_refused(hub: HubServer, run: Path) -> None:
    path = run / NAMES[1] / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4:] = b"\0\1\2\3"
    path.write_bytes(data)
    refused(hub, run, f"{path} has other contents than when it was saved")


def test_weights_of_another_level_are_refused(hub: HubServer, run: Path) -> None:
    shutil.copy(run / NAMES[2] / WEIGHTS, run / NAMES[1] / WEIGHTS)
    refused(hub, run, f"{run / NAMES[1] / WEIGHTS} has .* bytes, and had")


def test_zeroed_tail_is_refused(hub: HubServer, run: Path) -> None:
    path = run / NAMES[3] / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    refused(hub, run, f"{path} has other contents than when it was saved")


def test_second_file_of_weights_is_refused(hub: HubServer, run: Path) -> None:
    path = run / NAMES[0] / "adapter_model.safetensors"
    shutil.copy(run / NAMES[0] / WEIGHTS, path)
    with pytest.raises(ValueError, match=f"{path} was not there when the level was saved"):
        push(hub, run)


def test_level_of_another_run_is_refused(hub: HubServer, run: Path, tmp_path: Path) -> None:
    prune(tiny_model(), tmp_path / "other", train_dataset=tiny_blocks(16, seed=7))
    shutil.rmtree(run / NAMES[1])
    shutil.copytree(tmp_path / "other" / "levels" / NAMES[1], run / NAMES[1])
    refused(hub, run, f"{run / NAMES[1]} is a level of another run than {run}: its removal order differs")


def test_changed_level_is_not_pushed_by_a_run_either(
    hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    background = uploader(hub)
    (run / NAMES[0] / WEIGHTS).write_bytes(b"x")
    background.submit(LEVELS[0], run / NAMES[0])
    with pytest.raises(ValueError, match=f"{run / NAMES[0]}"):
        background.finish(run)
    assert NAMES[0] not in hub.branches(REPO)


# Only regular files of the kinds that a run writes


@pytest.mark.parametrize("with_manifest", [True, False])
def test_link_is_refused_and_its_target_stays_here(
    hub: HubServer, run: Path, tmp_path: Path, with_manifest: bool
) -> None:
    if not with_manifest:
        remove_manifests(run)
    (tmp_path / "id_rsa").write_text("a secret")
    (run / NAMES[2] / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    refused(hub, run, f"{run / NAMES[2]}/vocab.txt is a symbolic link.*cp -rL")


@pytest.mark.parametrize("name", ["README.md", "trajectory.json"])
def test_link_beside_the_levels_is_refused(hub: HubServer, run: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_bytes((run / name).read_bytes() if (run / name).exists() else b"a secret")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    refused(hub, run, f"{run / name} is a symbolic link")


def test_other_files_stay_here_and_are_named(hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("notes.txt", "optimizer.pt", "train.py", "logs/events.json", ".env"):
        (run / NAMES[0] / name).parent.mkdir(exist_ok=True)
        (run / NAMES[0] / name).write_text("mine")
    os.mkfifo(run / NAMES[0] / "pipe")
    with caplog.at_level(logging.WARNING):
        push(hub, run)
    others = {"notes.txt", "optimizer.pt", "train.py", ".env"}
    local = {name: data for name, data in contents(run / NAMES[0]).items() if name not in others}
    assert hub.files(REPO, NAMES[0]) == {**EMPTY, **local}
    assert "4 files are not of a kind that a run writes" in caplog.text
    assert all(name in caplog.text for name in ("notes.txt", "optimizer.pt", "train.py", "logs/events.json"))


def test_tokenizer_that_was_added_later_goes_up(hub: HubServer, run: Path) -> None:
    (run / NAMES[0] / "added_tokens.json").write_text("{}")
    push(hub, run)
    assert hub.files(REPO, NAMES[0])["added_tokens.json"] == b"{}"


def test_unusual_file_that_the_manifest_names_goes_up(hub: HubServer, run: Path) -> None:
    (run / NAMES[0] / "bpe.codes").write_text("a b")
    write_manifest(run / NAMES[0])
    push(hub, run)
    assert hub.files(REPO, NAMES[0])["bpe.codes"] == b"a b"
