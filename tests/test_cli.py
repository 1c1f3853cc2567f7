"""The command does what the functions do, explains itself, and answers a mistake with one line."""

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoModelForCausalLM

from gisp_hf import Trajectory
from gisp_hf.cli import card, levels, push
from gisp_hf.cli.common import say
from gisp_hf.cli.main import COMMANDS, build_parser, main
from gisp_hf.export.run import gguf_name
from gisp_hf.hub import LevelInfo, PushReport, read_levels
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.levels.manifest import write_manifest
from gisp_hf.levels.materialize import load_level, materialize
from gisp_hf.pruning.trajectory import Base
from tests.hub_server import HubServer
from tests.test_materialize import random_trajectory, save_base, upload
from tests.tiny import tiny_model

# The client's own, in the upload of every LFS file.
upload_warning = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with the levels 0.2 and 0.5; the base model is in ``base`` beside it."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model()
    random_trajectory(model, save_base(model, folder / "base")).save(folder / "run")
    for level in (0.2, 0.5):
        materialize(folder / "run", folder / "run" / f"sparsity-{level:.2f}", sparsity=level)
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that is the default one of this process, with a login."""
    with HubServer({"hf_owner": "me"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        yield server


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an answer to a mistake."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("gisp-hf: error: ")]
    assert out == "" and len(lines) == 1 and err.rstrip("\n").endswith(lines[0]) and "Traceback" not in err
    return lines[0].removeprefix("gisp-hf: error: ")


def cells(table: str) -> list[list[str]]:
    """The lines of a table, without that of the rules."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- what it explains ------------------------------------------------------------------------------------------------


class Recorder:
    """Stands where a parser would, and notes the options that a subcommand adds."""

    def __init__(self) -> None:
        self.added: list[tuple[str, dict[str, Any]]] = []

    def add_argument(self, *names: str, **settings: Any) -> None:
        self.added.append((names[0], settings))


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(COMMANDS) == ["levels", "materialize", "restore", "elastic", "push", "eval", "card", "export", "report"]
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in COMMANDS)


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"gisp-hf \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_every_option(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    recorder = Recorder()
    COMMANDS[name].add_options(recorder)
    assert recorder.added
    for option, settings in recorder.added:
        assert (option if option.startswith("-") else settings["metavar"]) in text
        assert " ".join(settings["help"].split()) in text
        if option.startswith("-"):
            assert "(required)" in settings["help"] or "(default: " in settings["help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_the_help_can_be_typed(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    example = " ".join(capsys.readouterr().out.split()).partition("example: ")[2]
    assert example.startswith(f"gisp-hf {name} ")
    assert build_parser().parse_args(shlex.split(example)[1:]).run is COMMANDS[name].run


def test_a_new_subcommand_is_one_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with four names, as a file of its own would be."""
    module: Any = ModuleType("greet")
    module.DESCRIPTION = "Greet somebody. And no more."
    module.EXAMPLE = "gisp-hf greet you"
    module.add_options = lambda parser: parser.add_argument("who", help="whom")
    module.run = lambda options: say(f"hello {options.who}")
    monkeypatch.setitem(COMMANDS, "greet", module)
    assert main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"^    greet\s+Greet somebody$", capsys.readouterr().out, re.MULTILINE)


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_levels_of_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", str(run)]) == 0
    head, *lines = cells(capsys.readouterr().out)
    assert head == ["level", "sparsity", "parameters", "in decoder layers"]
    for level, line in zip((0.2, 0.5), lines, strict=True):
        model = AutoModelForCausalLM.from_pretrained(run / f"sparsity-{level:.2f}")
        decoder = sum(parameter.numel() for parameter in model.model.layers.parameters())
        assert line == [f"sparsity-{level:.2f}", str(level), f"{model.num_parameters():,}", f"{decoder:,}"]


def test_levels_show_metrics_where_there_are_any(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        LevelInfo("sparsity-0.20", 0.2, 5, 4, commit="a" * 40, metrics={"name": 12.345, "commit": 1.0}),
        LevelInfo("sparsity-0.375", 0.375, 3, 2, commit="b" * 40, metrics={"name": None}),
    ]
    monkeypatch.setattr(levels, "read_levels", lambda source, *, revision: found)
    assert main(["levels", "me/x", "--revision", "v1"]) == 0
    head, first, second = cells(capsys.readouterr().out)
    assert head == ["level", "sparsity", "parameters", "in decoder layers", "name", "commit", "commit"]
    assert first == ["sparsity-0.20", "0.2", "5", "4", "12.35", "1.00", "a" * 40]
    assert second == ["sparsity-0.375", "0.375", "3", "2", "-", "-", "b" * 40]


def test_materialize_writes_what_load_level_loads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cut"
    options = ["--channel-multiple", "8", "--dtype", "bfloat16", "--base-model", str(run.parent / "base")]
    assert main(["materialize", str(run), "--sparsity", "0.37", "--output", str(output), *options]) == 0
    expected = load_level(run, sparsity=0.37, channel_multiple=8, dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(output)
    assert found.dtype == torch.bfloat16 and same_weights(found, expected)
    left = sum(parameter.numel() for parameter in found.model.layers.parameters())
    removed = 1 - left / Trajectory.load(run).layout.total
    assert capsys.readouterr().out == f"{output}: {removed:.2%} of the decoder layers' parameters removed\n"


def test_card_prints_the_cards(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectory, found = Trajectory.load(run), read_levels(run)
    version = AutoModelForCausalLM.from_pretrained(run / "sparsity-0.20").config.transformers_version
    known = {"license": "mit", "versions": {"transformers": version}}
    assert main(["card", str(run), "--license", "mit"]) == 0
    assert capsys.readouterr().out == main_card(trajectory, found, repo_id="user/run", report="report.html", **known)
    assert main(["card", str(run), "--level", "0.50", "--repo", "me/x", "--license", "mit"]) == 0
    assert capsys.readouterr().out == level_card(trajectory, found[1], repo_id="me/x", **known)


def test_card_of_a_run_that_was_cut_off(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """There are levels, and no trajectory beside them."""
    trajectory, found = Trajectory.load(run), read_levels(run)
    version = AutoModelForCausalLM.from_pretrained(run / "sparsity-0.20").config.transformers_version
    known = {"license": "mit", "versions": {"transformers": version}}
    (tmp_path / "cut-off").mkdir()
    (tmp_path / "cut-off" / "sparsity-0.50").symlink_to(run / "sparsity-0.50")
    assert main(["card", str(tmp_path / "cut-off"), "--level", "0.5", "--repo", "me/x", "--license", "mit"]) == 0
    assert capsys.readouterr().out == level_card(trajectory, found[1], repo_id="me/x", **known)


def test_a_card_in_a_folder_is_kept(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Those that the run itself wrote have its results; others may have been edited by hand."""
    mine = shutil.copytree(run, tmp_path / "run")
    (mine / "sparsity-0.20" / "README.md").write_text("---\ntags: [mine]\n---\n# Mine\n")
    assert main(["card", str(mine), "--level", "0.2"]) == 0
    assert capsys.readouterr().out == "---\ntags: [mine]\n---\n# Mine\n"
    for options in (["--level", "0.5"], [], ["--level", "0.2", "--license", "mit"]):
        assert main(["card", str(mine), *options]) == 0
        assert "library_name: transformers" in capsys.readouterr().out
    (mine / "README.md").write_text("# The whole run\n")
    assert main(["card", str(mine)]) == 0
    assert capsys.readouterr().out == "# The whole run\n"


@upload_warning
def test_push_then_use_what_was_pushed(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    card = "---\nlicense: llama3.1\n---\n# Base\n"
    base, mine = shutil.copytree(run.parent / "base", tmp_path / "base"), shutil.copytree(run, tmp_path / "run")
    (base / "README.md").write_text(card)
    commit = upload(hub, base, "me/cli-base")
    for folder in (mine, mine / "sparsity-0.20", mine / "sparsity-0.50"):
        trajectory = Trajectory.load(folder)
        replace(trajectory, base=Base("me/cli-base", commit, trajectory.base.fingerprint)).save(folder)
        if folder != mine:
            write_manifest(folder)

    assert main(["push", str(mine), "--repo", "me/cli-levels", "--private", "--tag", "v1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{hub.url}/me/cli-levels: sparsity-0.20, sparsity-0.50, main (3 of 3 branches changed)",
        "tags: v1-sparsity-0.20, v1-sparsity-0.50, v1",
    ]
    assert hub.repos["me/cli-levels"].private
    api = HfApi(endpoint=hub.url, token="hf_owner")
    for branch in ("main", "sparsity-0.20", "sparsity-0.50"):
        readme = Path(api.hf_hub_download("me/cli-levels", "README.md", revision=branch))
        found = ModelCard.load(readme).data
        assert (found.license, found.base_model) == ("llama3.1", "me/cli-base")
        assert "hf_owner" not in readme.read_text() and str(tmp_path) not in readme.read_text()
        assert f"`{commit}`" in readme.read_text()
    readme = Path(api.hf_hub_download("me/cli-levels", "README.md"))
    commits = {level.name: str(level.commit) for level in read_levels("me/cli-levels")}
    for name, oid in commits.items():
        assert hub.head("me/cli-levels", name) == oid
        assert re.search(rf"\| `{name}` .*\| `{oid[:8]}` \|", readme.read_text())

    assert main(["push", str(mine), "--repo", "me/cli-levels"]) == 0
    assert "(nothing had changed)" in capsys.readouterr().out
    assert main(["levels", "me/cli-levels"]) == 0
    out = capsys.readouterr().out
    assert all(f"{oid} |" in out for oid in commits.values()) and len(out.splitlines()) == 4
    output = tmp_path / "cut"
    assert main(["materialize", "me/cli-levels", "--sparsity", "0.3", "--output", str(output), "--revision", "v1"]) == 0
    assert same_weights(AutoModelForCausalLM.from_pretrained(output), load_level(run, sparsity=0.3))


@upload_warning
def test_push_of_a_run_whose_base_has_no_card(
    run: Path, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "--repo", "me/cli-local"]) == 0
    assert "was not found: the cards name none; --license gives one" in capsys.readouterr().err
    readme = HfApi(endpoint=hub.url, token="hf_owner").hf_hub_download("me/cli-local", "README.md")
    assert "license" not in ModelCard.load(readme).data.to_dict()
    assert main(["push", str(run), "--repo", "me/cli-local", "--license", "mit"]) == 0
    out, err = capsys.readouterr()
    assert "--license gives one" not in err and "3 of 3 branches changed" in out
    mine = shutil.copytree(run, tmp_path / "run")
    for folder in (mine, mine / "sparsity-0.20", mine / "sparsity-0.50"):
        (folder / "README.md").write_text(f"---\ntags: [mine]\n---\n# {folder.name}\n")
    assert main(["push", str(mine), "--repo", "me/cli-local"]) == 0
    assert "--license gives one" not in capsys.readouterr().err  # no card had to be written
    for branch, heading in (("main", b"# run\n"), ("sparsity-0.20", b"# sparsity-0.20\n")):
        assert hub.files("me/cli-local", branch)["README.md"].endswith(heading)


@upload_warning
def test_push_with_gguf_files(run: Path, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each level's branch gets the file that its folder has, and a card that names it; main gets none."""
    mine = shutil.copytree(run, tmp_path / "run")
    for level in ("sparsity-0.20", "sparsity-0.50"):
        for path in (mine / level).glob("tokenizer*"):
            path.unlink()  # the word-level tokenizer of the tests has no equal in llama.cpp
        write_manifest(mine / level)
    assert main(["push", str(mine), "--repo", "me/cli-gguf", "--license", "mit", "--gguf", "f32"]) == 0
    assert "sparsity-0.20: the level has no tokenizer" in capsys.readouterr().err
    for level in ("sparsity-0.20", "sparsity-0.50"):
        name = gguf_name("me/cli-gguf", level, "f32")
        files = hub.files("me/cli-gguf", level)
        assert files[name] == (mine / level / name).read_bytes() and files[name].startswith(b"GGUF")
        assert f"hf download me/cli-gguf {name} --revision {level}" in files["README.md"].decode()
    assert not any(name.endswith(".gguf") for name in hub.files("me/cli-gguf", "main"))
    assert main(["push", str(mine), "--repo", "me/cli-gguf", "--license", "mit"]) == 0
    assert "(nothing had changed)" in capsys.readouterr().out
    assert main(["push", str(mine), "--repo", "me/cli-gguf", "--license", "mit", "--gguf", "f32"]) == 0
    assert "(nothing had changed)" in capsys.readouterr().out


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys).startswith("the following arguments are required: COMMAND (`gisp-hf --help` explains)")
    assert "invalid choice: 'prune'" in fails(capsys, "prune")
    assert fails(capsys, "levels").endswith("REPO_OR_FOLDER (`gisp-hf levels --help` explains)")
    assert "required: --sparsity, --output" in fails(capsys, "materialize", "x")
    assert "--sparsity: invalid float value: '37%'" in fails(capsys, "materialize", "x", "--sparsity", "37%")
    assert "--dtype: invalid choice: 'int8'" in fails(capsys, "materialize", "x", "--dtype", "int8")
    assert "required: --repo" in fails(capsys, "push", "x")
    assert "unrecognized arguments: --fast" in fails(capsys, "levels", "x", "--fast")


@pytest.mark.parametrize("command", [["levels"], ["card"], ["push", "--repo", "me/x"], ["eval", "--text", "wikitext2"]])
def test_a_folder_without_levels(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no level" in fails(capsys, command[0], tmp_path, *command[1:])


def test_a_run_that_is_nowhere(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a folder here nor a repository" in fails(capsys, "levels", "me/nothing")
    assert "neither a folder here nor a repository" in fails(capsys, "levels", tmp_path / "nothing")


def test_card_refuses_what_cannot_be_on_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no level 0.3; it has 0.2, 0.5" in fails(capsys, "card", run, "--level", "0.3")
    assert "'Apache 2' is no identifier" in fails(capsys, "card", run, "--license", "Apache 2")
    assert "'nobody' is no id on the Hub" in fails(capsys, "card", run, "--repo", "nobody")


def test_materialize_refuses_what_cannot_be_cut(
    run: Path, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*options: object) -> str:
        return fails(capsys, "materialize", run, "--output", tmp_path / "cut", *options)

    assert "sparsity must lie in (0, 1), got 37; 20 % is written 0.2" in cut("--sparsity", "37")
    assert "lies beyond this trajectory" in cut("--sparsity", "0.99")
    assert "base model was not found" in cut("--sparsity", "0.3", "--base-model", "me/nothing")
    assert "Give the unpruned model" in cut("--sparsity", "0.3", "--base-model", run / "sparsity-0.20")
    assert "must be at least 1, got 0" in cut("--sparsity", "0.3", "--channel-multiple", "0")
    assert list(tmp_path.iterdir()) == []


def test_materialize_refuses_a_folder_that_exists(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists already" in fails(capsys, "materialize", run, "--output", tmp_path, "--sparsity", "0.3")
    assert list(tmp_path.iterdir()) == []


def test_materialize_leaves_a_folder_of_the_users_alone(run: Path, tmp_path: Path) -> None:
    """Beside the output, under the name that temporary folders once had."""
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "thesis.txt").write_text("mine")
    assert main(["materialize", str(run), "--sparsity", "0.3", "--output", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model.tmp" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.tmp"]


def test_push_refuses_what_the_hub_would_refuse(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "'a/b/c' is no id on the Hub" in fails(capsys, "push", run, "--repo", "a/b/c", "--license", "mit")
    hub.fail("POST", "/api/repos/create", status=403)
    assert "403" in fails(capsys, "push", run, "--repo", "you/x", "--license", "mit")
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token" in fails(capsys, "push", run, "--repo", "me/x", "--license", "mit")


@pytest.mark.parametrize(("options", "expected"), [([], False), (["--replace"], True)])
def test_push_replaces_another_run_only_if_asked(
    run: Path, options: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def push_levels(folder: Path, repo_id: str, *, replace: bool, **others: object) -> PushReport:
        given.append((folder, repo_id, replace))
        return PushReport("url", {}, {}, (), 0)

    monkeypatch.setattr(push, "push_levels", push_levels)
    assert main(["push", str(run), "--repo", "me/x", "--license", "mit", *options]) == 0
    assert given == [(run, "me/x", expected)]


# ---- a folder that holds the run -------------------------------------------------------------------------------------


@pytest.fixture
def quickstart(run: Path, tmp_path: Path) -> Path:
    """A folder whose only run is in ``iterative``, beside other things."""
    folder = tmp_path / "quickstart"
    shutil.copytree(run, folder / "iterative")
    (folder / "trainer" / "checkpoint-1").mkdir(parents=True)
    (folder / "notes.txt").write_text("notes")
    return folder


@pytest.mark.parametrize("command", [["levels"], ["card", "--license", "mit", "--repo", "me/x"]])
def test_the_run_in_a_folder_is_found(quickstart: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command[0], str(quickstart / "iterative"), *command[1:]]) == 0
    expected = capsys.readouterr()
    assert expected.err == ""
    assert main([command[0], str(quickstart), *command[1:]]) == 0
    found = capsys.readouterr()
    assert found.out == expected.out and found.err == f"using {quickstart / 'iterative'}\n"


def test_materialize_finds_the_run_in_a_folder(quickstart: Path, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    assert main(["materialize", str(quickstart), "--sparsity", "0.3", "--output", str(output)]) == 0
    expected = load_level(quickstart / "iterative", sparsity=0.3)
    assert same_weights(AutoModelForCausalLM.from_pretrained(output), expected)


def test_eval_finds_the_run_in_a_folder(quickstart: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w4 w5 w6 w7 " * 10)
    assert main(["eval", str(quickstart), "--text", str(tmp_path / "text.txt"), "--window", "16"]) == 0
    metrics = json.loads((quickstart / "iterative" / "sparsity-0.20" / "metrics.json").read_text())
    assert list(metrics) == ["perplexity_16"]


@upload_warning
def test_push_finds_the_run_in_a_folder(quickstart: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(quickstart), "--repo", "me/cli-found", "--license", "mit"]) == 0
    assert "(3 of 3 branches changed)" in capsys.readouterr().out


def test_several_runs_in_a_folder_are_named(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(quickstart / "iterative", quickstart / "one-shot")
    message = fails(capsys, "levels", quickstart)
    assert "holds several runs: iterative, one-shot; give one of them" in message


# ---- endings ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(levels, "read_levels", interrupted)
    assert main(["levels", str(run)]) == 130
    assert capsys.readouterr() == ("", "gisp-hf: interrupted\n")


def test_a_card_cannot_steer_the_terminal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = shutil.copytree(run, tmp_path / "run")
    (mine / "README.md").write_text("# Title\x1b]0;owned\x07\n\ttab \u202e \U0001f469\u200d\U0001f4bb\n")
    assert main(["card", str(mine)]) == 0
    expected = "# Title\\x1b]0;owned\\x07\n\ttab \\u202e \U0001f469\u200d\U0001f4bb\n"
    assert capsys.readouterr().out == expected


def test_only_the_escaping_functions_print() -> None:
    folder = Path(card.__file__).parent
    calls = {path.name: path.read_text().count("print(") for path in folder.glob("*.py")}
    assert {name for name, count in calls.items() if count} == {"common.py"} and calls["common.py"] == 2


def test_what_is_unexpected_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(levels, "read_levels", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["levels", str(run)])


@pytest.mark.filterwarnings("ignore:'gisp_hf.cli.main' found in sys.modules:RuntimeWarning")
def test_the_module_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli.py", "levels", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("gisp_hf.cli.main", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"gisp-hf: error: {tmp_path} holds no level")
