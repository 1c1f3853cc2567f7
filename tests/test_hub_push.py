"""A run pushed to the Hub of ``hub_server.py`` by the unmodified client: at once, or while it is made."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import AutoModelForCausalLM

from gisp_hf.hub import LevelInfo, LevelUploader, PushError, PushReport, push_levels, read_levels
from tests.hub_routes import File
from tests.hub_server import GIT_ATTRIBUTES, HubServer, Token
from tests.runs import LEVELS, prune
from tests.tiny import tiny_blocks, tiny_model

# The client's own, in the upload of every LFS file.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

REPO = "me/pruned"
NAMES = ["sparsity-0.20", "sparsity-0.30", "sparsity-0.40", "sparsity-0.50"]
SECRET = "hf_secretsecretsecret"
TOKENS = {SECRET: Token("me", orgs=("lab",)), "hf_readerreader": Token("me", role="read"), "hf_you": "you"}
EMPTY = {".gitattributes": GIT_ATTRIBUTES}
OF_A_LEVEL = {"README.md", "manifest.json"}  # which main does not take from the mildest level
CARD = "---\nlicense: mit\n---\n# {}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Loader"]:
    """Another process that loads over HTTP, as a user does, from a Hub of its own."""
    with HubServer(TOKENS) as server:
        loader = Loader(server, tmp_path_factory.mktemp("loader"))
        yield loader
        loader.process.terminate()
        loader.process.wait()


class Loader:
    CODE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import gisp_hf

for line in sys.stdin:
    repo, revision, inputs, outputs = json.loads(line)
    try:
        model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
        with torch.no_grad():
            torch.save(model(torch.load(inputs)).logits, outputs)
        answer = "loaded"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print("ANSWER", ascii(answer), flush=True)
"""

    def __init__(self, hub: HubServer, folder: Path):
        self.hub, self.folder = hub, folder
        self.inputs = torch.stack([block["input_ids"] for block in tiny_blocks(2)])
        torch.save(self.inputs, folder / "inputs.pt")
        environment = {**os.environ, **hub.environment(SECRET, str(folder / "home")), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            env=environment,
            stdin=-1,
            stdout=-1,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, repo: str, revision: str) -> torch.Tensor | str:
        """The logits of the model that is loaded, or the error."""
        line = [repo, revision, str(self.folder / "inputs.pt"), str(self.folder / "logits.pt")]
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        answer = next(line for line in self.process.stdout if line.startswith("ANSWER"))
        return torch.load(self.folder / "logits.pt") if "'loaded'" in answer else answer

    def expected(self, folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder)(self.inputs).logits


def make_run(folder: Path) -> Path:
    """The output folder of a run with four levels, each with its card."""
    prune(tiny_model("llama"), folder)
    for name in NAMES:
        (folder / "levels" / name / "README.md").write_text(CARD.format(name))
    return folder / "levels"


def push(hub: HubServer, folder: Path, repo: str = REPO, **options) -> PushReport:
    defaults = {"token": SECRET, "endpoint": hub.url, "progress": False, "wait": lambda seconds: None}
    return push_levels(folder, repo, **{**defaults, **options})


def uploader(hub: HubServer, repo: str = REPO, **options) -> LevelUploader:
    defaults = {"token": SECRET, "endpoint": hub.url, "progress": False, "wait": lambda seconds: None}
    return LevelUploader(repo, **{**defaults, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_complete(hub: HubServer, run: Path, repo: str = REPO) -> None:
    """Every branch holds what it should and not a byte else, after a single commit."""
    for name in NAMES:
        assert hub.files(repo, name) == {**EMPTY, **contents(run / name)}, name
        assert len(hub.log(repo, name)) == 2, name
    main = {**EMPTY, **contents(run / NAMES[0]), **contents(run)}
    main = {name: data for name, data in main.items() if name not in OF_A_LEVEL}
    assert {path: data for path, data in hub.files(repo).items() if path != "levels.json"} == main
    table = json.loads(hub.files(repo)["levels.json"])["levels"]
    assert {name: level["commit"] for name, level in table.items()} == {name: hub.head(repo, name) for name in NAMES}


def assert_no_blob_twice(hub: HubServer) -> None:
    stored = [record.path for record in hub.requests if record.method == "PUT" and record.status == 200]
    assert len(stored) == len(set(stored)), stored


# What is there afterwards


@pytest.mark.slow
def test_four_levels_come_back_equal(loader: Loader, run: Path) -> None:
    report = push(loader.hub, run)
    assert_complete(loader.hub, run)
    assert report.commits == {**{name: loader.hub.head(REPO, name) for name in NAMES}, "main": loader.hub.head(REPO)}
    assert report.url == f"{loader.hub.url}/{REPO}" and report.sent == (*NAMES, "main")
    logits = {name: loader(REPO, name) for name in [*NAMES, "main", report.commits[NAMES[2]]]}
    for name in NAMES:
        torch.testing.assert_close(logits[name], loader.expected(run / name), rtol=0, atol=0)
    torch.testing.assert_close(logits["main"], logits[NAMES[0]], rtol=0, atol=0)
    torch.testing.assert_close(logits[report.commits[NAMES[2]]], logits[NAMES[2]], rtol=0, atol=0)


def test_second_push_sends_nothing(hub: HubServer, run: Path) -> None:
    first = push(hub, run)
    (count, size), (blobs, blob_bytes) = hub.total(), hub.total("PUT")
    hub.requests.clear()
    second = push(hub, run)
    numbers = f"first {count} requests, {size} bytes, {blobs} blobs of {blob_bytes}; second {hub.total()}"
    assert (hub.total("PUT"), hub.total("POST", "/commit/|/preupload/|/batch")) == ((0, 0), (0, 0)), numbers
    assert hub.total()[0] == 7 and hub.total()[1] < 100, numbers  # create, refs, five listings
    assert second == PushReport(first.url, first.commits, {}, sent=(), bytes_sent=0)
    assert blob_bytes <= first.bytes_sent <= size, numbers


def test_cards_metrics_and_tags(hub: HubServer, run: Path) -> None:
    seen: dict[str, list[LevelInfo]] = {}

    def card(branch: str, levels: list[LevelInfo]) -> str | None:
        seen[branch] = levels
        return None if branch == NAMES[0] else CARD.format(f"the card of {branch}")

    options = {"card": card, "metrics": {0.2: {"perplexity": 12.5}}, "tag": "v1.0", "private": True}
    report = push(hub, run, "lab/pruned", **options)
    assert hub.repos["lab/pruned"].private
    assert hub.files("lab/pruned", NAMES[0])["README.md"] == CARD.format(NAMES[0]).encode()
    for branch in [*NAMES[1:], "main"]:
        assert hub.files("lab/pruned", branch)["README.md"] == CARD.format(f"the card of {branch}").encode()
    assert (
        hub.tags("lab/pruned")
        == report.tags
        == {f"v1.0{'' if branch == 'main' else '-' + branch}": commit for branch, commit in report.commits.items()}
    )
    hub.requests.clear()
    assert push(hub, run, "lab/pruned", **options).sent == () and hub.total("POST", "/tag/|/commit/") == (0, 0)
    levels = read_levels("lab/pruned", token=SECRET, endpoint=hub.url)
    assert levels == seen["main"] == read_levels("lab/pruned", revision="v1.0", token=SECRET, endpoint=hub.url)
    assert [level.metrics for level in levels] == [{"perplexity": 12.5}, {}, {}, {}]
    assert [level.commit for level in levels] == [report.commits[name] for name in NAMES]
    with pytest.raises(PushError, match="lab/pruned, tag v1.0: it stands at .* choose another tag"):
        push(hub, run, "lab/pruned", **{**options, "metrics": None})


def test_numbers_of_the_levels_are_those_of_the_models(hub: HubServer, run: Path) -> None:
    push(hub, run)
    levels, local = read_levels(REPO, token=SECRET, endpoint=hub.url), read_levels(run)
    assert [(level.name, level.sparsity, level.commit) for level in local] == list(zip(NAMES, LEVELS, [None] * 4))
    for there, here, name in zip(levels, local, NAMES):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        assert there.parameters == here.parameters == model.num_parameters()
        layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
        assert there.decoder_parameters == here.decoder_parameters == layers


def old_repository(hub: HubServer, model: Path) -> HfApi:
    """Another model in ``main``, in shards and pickles and with an adapter, and files that are nobody's business."""
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo(REPO, exist_ok=True)
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.model"]
    names += ["adapter_config.json", "notes.md", "figures/model.safetensors", "tokenization_old.py"]
    files = {name: name.encode() for name in names}
    files |= {"config.json": (model / "config.json").read_bytes(), "model.safetensors": b"old weights"}
    api.create_commit(REPO, [CommitOperationAdd(*item) for item in files.items()], commit_message="old")
    ignore = CommitOperationAdd(".gitignore", b"*.safetensors\n*.json\n")
    api.create_commit(REPO, [ignore], commit_message="what create_commit would silently leave out from now on")
    return api


def test_old_files_do_not_mix_with_new_ones(hub: HubServer, run: Path) -> None:
    api = old_repository(hub, run / NAMES[3])
    api.create_branch(REPO, branch=NAMES[1])  # from main, as push_to_hub(revision=) does
    hub.lose_answer("POST", "/commit/main")  # what is deleted cannot be deleted again
    push(hub, run)
    assert len(hub.log(REPO)) == 4
    for name in NAMES:
        assert hub.files(REPO, name) == {**EMPTY, **contents(run / name)}
    main, kept = hub.files(REPO), {".gitignore", "notes.md", "figures/model.safetensors", "tokenization_old.py"}
    assert set(main) == {*EMPTY, *contents(run / NAMES[0]), *contents(run), "levels.json", *kept} - OF_A_LEVEL
    assert main["model.safetensors"] == (run / NAMES[0] / "model.safetensors").read_bytes()


def test_deleted_branch_is_restored(hub: HubServer, run: Path) -> None:
    push(hub, run)
    HfApi(endpoint=hub.url, token=SECRET).delete_branch(REPO, branch=NAMES[1])
    hub.requests.clear()
    assert push(hub, run).sent == (NAMES[1], "main")
    assert hub.total("PUT") == (0, 0)
    assert hub.files(REPO, NAMES[1]) == {**EMPTY, **contents(run / NAMES[1])}
    assert json.loads(hub.files(REPO)["levels.json"])["levels"][NAMES[1]]["commit"] == hub.head(REPO, NAMES[1])


@pytest.mark.slow
def test_half_pushed_repository_fails_to_load(loader: Loader, run: Path) -> None:
    hub, repo = loader.hub, "me/half"
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo(repo)
    # A history squashed to one commit, with another model in it.
    state = hub.repos[repo]
    state.refs["branch"].clear()
    first = {name: File(data, lfs=name.endswith("rs")) for name, data in contents(run / NAMES[3]).items()}
    state.objects.update({file.sha256: file.data for file in first.values() if file.lfs})
    state.add_commit("main", {**state.find(state.commits.copy().popitem()[0]).files, **first}, "squashed", "", "me")
    hub.fail("POST", f"/commit/{NAMES[2]}", status=413)
    with pytest.raises(PushError):
        push(hub, run, repo)
    torch.testing.assert_close(loader(repo, NAMES[0]), loader.expected(run / NAMES[0]), rtol=0, atol=0)
    torch.testing.assert_close(loader(repo, "main"), loader.expected(run / NAMES[3]), rtol=0, atol=0)  # untouched
    assert NAMES[2] in hub.branches(repo) and NAMES[3] not in hub.branches(repo)
    assert "ValueError: Unrecognized model" in loader(repo, NAMES[2])  # there is no config.json
    assert "OSError" in loader(repo, NAMES[3])
    with pytest.raises(FileNotFoundError, match="not to the end"):
        read_levels(repo, token=SECRET, endpoint=hub.url)
    push(hub, run, repo)
    for name in NAMES:
        assert hub.files(repo, name) == {**EMPTY, **contents(run / name)}


# While the run goes on


def test_levels_are_uploaded_while_pruning_goes_on(hub: HubServer, run: Path, tmp_path: Path) -> None:
    hub.slow("PUT|POST", "", 0.05)
    push_in_background = uploader(hub)
    folder = tmp_path / "out"
    uploaded = []
    for level, name in zip(LEVELS, NAMES):
        shutil.copytree(run / name, folder / name)  # "pruning"
        start = time.monotonic()
        push_in_background.submit(level, folder / name)
        assert time.monotonic() - start < 0.2  # its upload takes longer
        deadline = time.monotonic() + 10
        while name != NAMES[3] and time.monotonic() < deadline and len(uploaded) <= NAMES.index(name):
            uploaded = [n for n in NAMES if n in hub.branches(REPO) and len(hub.log(REPO, n)) == 2]
            time.sleep(0.01)
    assert uploaded == NAMES[:3]
    assert hub.files(REPO) == EMPTY  # main is last
    for path in run.glob("trajectory.*"):
        shutil.copy(path, folder)
    report = push_in_background.finish(folder)
    assert_complete(hub, run)
    assert not push_in_background.errors and report.sent == (*NAMES, "main")
    assert_no_blob_twice(hub)


def test_failure_in_the_background_is_made_good_at_the_end(
    hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push_in_background = uploader(hub)
    hub.fail("POST", f"/commit/{NAMES[0]}", status=403)
    hub.fail("POST", "/commit/main", status=403)
    push_in_background.submit(LEVELS[0], run / NAMES[0])
    deadline = time.monotonic() + 10
    while not push_in_background.errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert f"{REPO}, {NAMES[0]}: status 403" in str(push_in_background.errors[NAMES[0]])
    assert "The run goes on" in caplog.text
    with pytest.raises(PushError, match=f"{REPO}, main: status 403.*gisp-hf push .*levels --repo {REPO}"):
        push_in_background.finish(run)
    push_in_background.finish(run)
    assert_complete(hub, run)


# Tables of levels

GOOD = {"commit": "0" * 40, "sparsity": 0.2, "parameters": 1, "decoder_parameters": 1, "metrics": {}}


def test_malicious_table_is_refused(hub: HubServer) -> None:
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo(REPO)

    def read(text: str) -> list[LevelInfo]:
        commit = api.create_commit(REPO, [CommitOperationAdd("levels.json", text.encode())], commit_message="x")
        return read_levels(REPO, revision=commit.oid, token=SECRET, endpoint=hub.url)

    def table(name: str = NAMES[0], **changes: object) -> str:
        return json.dumps({"format": 1, "levels": {name: {**GOOD, **changes}}})

    assert read(table()) == [LevelInfo(name=NAMES[0], **GOOD)]
    bad = [
        table(name) for name in ("../../x", "main", "refs/pr/1", "sparsity-0.2", "sparsity-0.20/..", "sparsity-0.00")
    ]
    bad += [table("sparsity-0.٢٠"), table("sparsity-0.20\n"), table(sparsity=0.3), table(sparsity=True)]
    bad += [table(commit=commit) for commit in ("main", "0" * 39, "0" * 40 + "\n", None, ["0" * 40])]
    bad += [table(parameters=-1), table(parameters=1.5), table(decoder_parameters=10**30), table(name2="\x1b[31m")]
    bad += [table(metrics={"perplexity": value}) for value in (math.nan, math.inf, True, "1", 10**400)]
    bad += [table(metrics={"\x1b[2J": 1.0}), table(metrics=[]), '{"format": 2, "levels": {}}', "[]", "{", "[" * 100_000]
    bad += [json.dumps({"format": 1, "levels": {}, "padding": "x" * 2**20})]
    for text in bad:
        with pytest.raises(ValueError, match=f"^levels.json of {REPO} is not what `gisp-hf push` writes") as error:
            read(text)
        assert str(error.value).isprintable() and len(str(error.value)) < 450, text[:100]


def test_missing_revision_and_repository_are_told_apart(hub: HubServer) -> None:
    HfApi(endpoint=hub.url, token=SECRET).create_repo(REPO)
    with pytest.raises(ValueError, match="no revision 'v9'"):
        read_levels(REPO, revision="v9", token=SECRET, endpoint=hub.url)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository"):
        read_levels("me/missing", token=SECRET, endpoint=hub.url)
