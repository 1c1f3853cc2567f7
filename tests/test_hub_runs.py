"""Two runs and one repository: the second is refused before it writes, and no push reports levels that are gone."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi

from gisp_hf.hub import PushError, PushReport
from gisp_hf.hub.runs import difference
from gisp_hf.pruning.trajectory import Trajectory
from tests.hub_server import HubServer
from tests.runs import LEVELS, prune, tiny_config
from tests.test_hub_push import EMPTY, NAMES, REPO, SECRET, TOKENS, assert_complete, contents, make_run, push, uploader
from tests.tiny import tiny_blocks, tiny_model

# The client's own, in the upload of every LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REFUSED = rf"^{REPO} holds another run \(main\): its removal order differs. Give another repository; or replace"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same model, with other levels, on other data."""
    folder = tmp_path_factory.mktemp("other_data")
    config = tiny_config(sparsity_levels=(0.2, 0.35))
    prune(tiny_model(), folder, config=config, train_dataset=tiny_blocks(16, seed=7))
    return folder / "levels"


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with other weights."""
    folder = tmp_path_factory.mktemp("other_base")
    prune(tiny_model(seed=3), folder)
    return folder / "levels"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


def state(hub: HubServer) -> dict[str, dict[str, str]]:
    return {"branches": hub.branches(REPO), "tags": hub.tags(REPO)}


def assert_refused(hub: HubServer, action: Callable[[], object], reason: str) -> None:
    before = state(hub)
    with pytest.raises(PushError, match=reason) as error:
        action()
    assert state(hub) == before and str(error.value).isprintable()


def assert_table_fits(hub: HubServer) -> None:
    table = json.loads(hub.files(REPO)["levels.json"])["levels"]
    heads = hub.branches(REPO)
    assert {name: level["commit"] for name, level in table.items()} == {name: heads[name] for name in table}


# Another run is refused before the first write


def test_run_on_other_data_is_refused(hub: HubServer, run: Path, other_data: Path) -> None:
    push(hub, run)
    assert_refused(hub, lambda: push(hub, other_data), REFUSED)
    assert_complete(hub, run)


def test_run_of_another_base_is_refused(hub: HubServer, run: Path, other_base: Path) -> None:
    push(hub, run)
    there, here = (Trajectory.load(folder).base.fingerprint[:12] for folder in (run, other_base))
    assert_refused(hub, lambda: push(hub, other_base), f"fingerprint {there}, this one from .* fingerprint {here}")


def test_run_that_was_not_pushed_to_the_end_is_not_mixed_with(hub: HubServer, run: Path, other_data: Path) -> None:
    hub.fail("POST", f"/commit/{NAMES[2]}", status=403)
    with pytest.raises(PushError, match="status 403"):
        push(hub, run)
    shutil.rmtree(other_data.parent / "some", ignore_errors=True)
    some = shutil.copytree(other_data, other_data.parent / "some")
    shutil.rmtree(some / NAMES[0])  # no level of the one is a level of the other
    assert_refused(hub, lambda: push(hub, some), rf"holds another run \({NAMES[0]}\): its removal order differs")
    push(hub, run)
    assert_complete(hub, run)


def test_replace_writes_over_another_run_and_names_its_levels(
    hub: HubServer, run: Path, other_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(hub, run)
    with caplog.at_level(logging.WARNING):
        report = push(hub, other_data, replace=True)
    assert report.stale == (*NAMES[1:],) and list(report.commits) == [NAMES[0], "sparsity-0.35", "main"]
    assert "branches of levels that this run does not have: 'sparsity-0.30, sparsity-0.40" in caplog.text
    assert hub.files(REPO, NAMES[0]) == {**EMPTY, **contents(other_data / NAMES[0])}
    assert hub.files(REPO, NAMES[3]) == {**EMPTY, **contents(run / NAMES[3])}  # left alone
    assert_table_fits(hub)


def test_replaced_run_needs_no_replace_the_next_time(hub: HubServer, run: Path, other_data: Path) -> None:
    push(hub, run)
    first = push(hub, other_data, replace=True)
    assert push(hub, other_data) == replace(first, sent=(), bytes_sent=0)
    assert_refused(hub, lambda: push(hub, run), "its removal order differs")


def test_replacement_that_was_cut_off_says_how_to_go_on(hub: HubServer, run: Path, other_data: Path) -> None:
    push(hub, run)
    hub.fail("POST", "/commit/main", status=403)
    with pytest.raises(PushError, match=f"`gisp-hf push {other_data} --repo {REPO} --replace` does the rest"):
        push(hub, other_data, replace=True)
    push(hub, other_data, replace=True)
    assert_table_fits(hub)


def test_damaged_trajectory_is_refused_in_printable_words(hub: HubServer, run: Path) -> None:
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo(REPO)
    for text in ('{"format": "\x1b[2J"}', "[" * 100_000, "{"):
        files = {"trajectory.json": text.encode(), "trajectory.safetensors": b"x"}
        api.create_commit(REPO, [CommitOperationAdd(*item) for item in files.items()], commit_message="another")
        assert_refused(hub, lambda: push(hub, run), r"holds another run \(main\): its trajectory cannot be read")


def test_strange_names_of_another_run_are_escaped(hub: HubServer, run: Path, tmp_path: Path) -> None:
    trajectory = Trajectory.load(run)
    replace(trajectory, base=replace(trajectory.base, id="\x1b[31mevil", fingerprint="\x07" * 64)).save(tmp_path)
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo(REPO)
    files = [CommitOperationAdd(path.name, path) for path in tmp_path.iterdir() if path.is_file()]
    api.create_commit(REPO, files, commit_message="another")
    assert_refused(hub, lambda: push(hub, run), r"it was made from \?\[31mevil")


# The same run is not


def test_run_that_was_cut_off_is_finished_later(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """``main`` holds a shorter order first, that of the last level."""
    part = tmp_path / "part"
    for name in NAMES[:2]:
        shutil.copytree(run / name, part / name)
    assert list(push(hub, part).commits) == [*NAMES[:2], "main"]
    report = push(hub, run)
    assert report.sent == (*NAMES[2:], "main") and report.stale == ()
    assert_table_fits(hub)


def test_fewer_levels_of_the_same_run_leave_the_others_and_name_them(hub: HubServer, run: Path, tmp_path: Path) -> None:
    push(hub, run)
    part = shutil.copytree(run, tmp_path / "part")
    shutil.rmtree(part / NAMES[2])
    assert push(hub, part).stale == (NAMES[2],)
    assert_table_fits(hub)


def test_nothing_is_downloaded_to_see_that_the_run_is_the_same(hub: HubServer, run: Path) -> None:
    push(hub, run)
    hub.requests.clear()
    push(hub, run)
    assert hub.total("GET|HEAD", "/resolve/|/storage/")[0] == 0


# What another push does meanwhile


def test_level_that_another_push_moves_is_an_error(hub: HubServer, run: Path) -> None:
    def meddle(method: str, path: str) -> None:
        if path.endswith("/commit/main"):
            hub.on_request = lambda method, path: None
            hub.repos[REPO].add_commit(NAMES[1], {}, "meddled", "", "you")

    hub.on_request = meddle
    with pytest.raises(
        PushError, match=f"another push has moved {NAMES[1]} meanwhile.*`gisp-hf push {run} --repo {REPO}`"
    ):
        push(hub, run)
    push(hub, run)
    assert_table_fits(hub)


def test_two_runs_at_once_do_not_both_succeed(hub: HubServer, run: Path, other_data: Path) -> None:
    """Both find an empty repository; the second writes between the first one's last level and its main."""
    reports: list[PushReport] = []

    def interfere(method: str, path: str) -> None:
        if (method, path) == ("POST", f"/api/models/{REPO}/commit/{NAMES[3]}"):
            hub.on_request = lambda method, path: None
            reports.append(push(hub, other_data, replace=True))

    hub.on_request = interfere
    with pytest.raises(PushError, match=f"another push has moved {NAMES[0]} meanwhile"):
        push(hub, run)
    assert reports[0].commits["main"] == hub.head(REPO)  # the first did not write over it
    assert_table_fits(hub)


# A tag that is taken


@pytest.mark.parametrize("tag", ["v1", f"v1-{NAMES[2]}"])
def test_taken_tag_is_refused_before_anything_is_written(hub: HubServer, run: Path, tag: str) -> None:
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo(REPO)
    api.create_tag(REPO, tag=tag)
    stands, branch = hub.head(REPO), NAMES[2] if "-" in tag else "main"
    assert_refused(
        hub,
        lambda: push(hub, run, tag="v1"),
        f"^{REPO}, tag {tag}: it stands at {stands}, and this push changes {branch}; choose another tag",
    )
    assert hub.total("PUT|POST", "/storage/|/commit/|/branch/")[0] == 0


def test_tag_of_an_earlier_state_is_refused_even_if_nothing_changes(hub: HubServer, run: Path) -> None:
    push(hub, run)
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_tag(REPO, tag="v1", revision=hub.log(REPO)[-1].id)
    assert_refused(hub, lambda: push(hub, run, tag="v1"), f"and this push is at {hub.head(REPO)}; choose another tag")


def test_half_of_the_tags_are_completed(hub: HubServer, run: Path) -> None:
    hub.fail("POST", "/tag/", nth=3, status=403)
    with pytest.raises(PushError, match="status 403"):
        push(hub, run, tag="v1")
    assert len(hub.tags(REPO)) == 2
    hub.faults.clear()
    report = push(hub, run, tag="v1")
    assert hub.tags(REPO) == report.tags and len(report.tags) == 5


# A run that pushes while it goes on


def beginning(trajectory: Trajectory, sparsity: float = 0.0) -> Trajectory:
    """What is known of a run at its start, or when it is resumed."""
    length = trajectory.prefix(sparsity) if sparsity else 0
    return replace(trajectory, ranks=tuple(torch.where(rank < length, rank, -1) for rank in trajectory.order), steps=())


def test_uploader_refuses_another_base_at_its_start(hub: HubServer, run: Path, other_base: Path) -> None:
    push(hub, run)
    start = beginning(Trajectory.load(other_base))
    assert_refused(hub, lambda: uploader(hub, run=start), "it was made from .* with fingerprint")
    uploader(hub, run=start, replace=True)


def test_uploader_refuses_another_configuration_at_its_start(hub: HubServer, run: Path, other_data: Path) -> None:
    push(hub, run)
    start = beginning(Trajectory.load(other_data))
    assert_refused(hub, lambda: uploader(hub, run=start), r"another configuration \(differs in sparsity_levels\)")


def test_uploader_refuses_other_calibration_data_at_its_start(hub: HubServer, run: Path) -> None:
    push(hub, run)
    start = replace(beginning(Trajectory.load(run)), calibration={"seed": 7})
    assert_refused(hub, lambda: uploader(hub, run=start), "other calibration data")


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_same_run_may_begin_again_or_be_resumed(hub: HubServer, run: Path, sparsity: float) -> None:
    first = uploader(hub, run=beginning(Trajectory.load(run)))
    for level, name in zip(LEVELS[:2], NAMES[:2]):
        first.submit(level, run / name)
    del first  # killed, at some moment
    second = uploader(hub, run=beginning(Trajectory.load(run), sparsity))
    for level, name in zip(LEVELS, NAMES):
        second.submit(level, run / name)
    second.finish(run)
    assert_complete(hub, run)


def test_uploader_never_writes_over_a_level_of_another_order(
    hub: HubServer, run: Path, other_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot know the order at its start."""
    push(hub, run)
    before = state(hub)
    background = uploader(hub)
    background.submit(0.2, other_data / NAMES[0])
    with pytest.raises(PushError, match="holds another run .*its removal order differs"):
        background.finish(other_data)
    assert state(hub) == before


def test_uploader_replaces_if_asked(hub: HubServer, run: Path, other_data: Path) -> None:
    push(hub, run)
    background = uploader(hub, run=beginning(Trajectory.load(other_data)), replace=True)
    background.submit(0.2, other_data / NAMES[0])
    assert background.finish(other_data).stale == (*NAMES[1:],)
    assert_table_fits(hub)


# What makes two runs


def test_an_order_and_its_beginnings_are_one_run(run: Path, other_data: Path, other_base: Path) -> None:
    whole = Trajectory.load(run)
    for name in NAMES:
        level = Trajectory.load(run / name)
        assert difference(level, whole) is None and difference(whole, level) is None
    assert difference(Trajectory.load(run / NAMES[0]), Trajectory.load(run / NAMES[1])) is None


def test_one_exchange_in_an_order_makes_another_run(run: Path) -> None:
    whole = Trajectory.load(run)
    last = len(whole) - 1
    swapped = [torch.where(rank == last, last - 1, torch.where(rank == last - 1, last, rank)) for rank in whole.order]
    other = replace(whole, ranks=tuple(swapped))
    assert difference(whole, other) == "its removal order differs"
    assert difference(other, Trajectory.load(run / NAMES[0])) is None  # the exchange comes later
