"""The Hub of ``hub_server.py`` against the real client: what goes in comes out, and faults surface as on the Hub."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from tests.hub_server import GIT_ATTRIBUTES, HubServer, Token
from tests.tiny import tiny_blocks, tiny_model

# The client's own, in the upload of every LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/model"
WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: mit\n---\n# A model\n"
FILES = {"README.md": CARD, "config.json": b'{"a": 1}\n', "code/model.py": b"x = 1\n", "model.safetensors": WEIGHTS}
TOKENS = {
    "hf_owner": "me",
    "hf_reader": Token("me", role="read"),
    "hf_member": Token("you", orgs=("lab",)),
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The owner's client; the repository exists."""
    api = HfApi(endpoint=hub.url, token="hf_owner")
    api.create_repo(REPO)
    return api


def additions(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def commit(api: HfApi, files: dict[str, bytes], **options: str | bool) -> CommitInfo:
    return api.create_commit(REPO, additions(files), commit_message="a level", **options)


def status_of(error: pytest.ExceptionInfo) -> int:
    return error.value.response.status_code


# Repositories, refs, tokens


def test_new_repository_holds_one_commit(hub: HubServer, api: HfApi) -> None:
    assert hub.files(REPO) == {".gitattributes": GIT_ATTRIBUTES}
    first = api.list_repo_commits(REPO)
    assert [c.commit_id for c in first] == [hub.head(REPO)]
    assert (first[0].title, first[0].authors) == ("initial commit", ["system"])
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert status_of(error) == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert len(hub.log(REPO)) == 1


def test_branch_from_the_first_commit_leaves_later_files_out(hub: HubServer, api: HfApi) -> None:
    commit(api, FILES)
    first = api.list_repo_commits(REPO)[-1].commit_id
    api.create_branch(REPO, branch="sparsity-0.20", revision=first)
    api.create_branch(REPO, branch="from/main")
    assert hub.branches(REPO) == {"main": hub.head(REPO), "from/main": hub.head(REPO), "sparsity-0.20": first}
    assert list(hub.files(REPO, "sparsity-0.20")) == [".gitattributes"]
    refs = api.list_repo_refs(REPO)
    assert {branch.name: branch.target_commit for branch in refs.branches} == hub.branches(REPO)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(REPO, branch="sparsity-0.20")
    assert status_of(error) == 409
    api.create_branch(REPO, branch="sparsity-0.20", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="other", revision="0" * 40)
    api.delete_branch(REPO, branch="from/main")
    assert set(hub.branches(REPO)) == {"main", "sparsity-0.20"}
    with pytest.raises(HfHubHTTPError) as error:
        api.delete_branch(REPO, branch="main")
    assert status_of(error) == 403


def test_tag_stays_where_it_was_put(hub: HubServer, api: HfApi) -> None:
    commit(api, {"config.json": b"{}"})
    tagged = hub.head(REPO)
    api.create_tag(REPO, tag="v1", tag_message="first", revision="main")
    commit(api, {"config.json": b"{ }"})
    assert {tag.name: tag.target_commit for tag in api.list_repo_refs(REPO).tags} == {"v1": tagged} == hub.tags(REPO)
    assert hub.files(REPO, "v1")["config.json"] == b"{}"
    assert api.model_info(REPO, revision="v1").sha == tagged
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(REPO, tag="v1")
    assert status_of(error) == 409
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1")


def test_tokens_and_roles(hub: HubServer, api: HfApi) -> None:
    assert api.whoami()["name"] == "me"
    assert api.whoami(token="hf_reader")["auth"]["accessToken"]["role"] == "read"
    assert [org["name"] for org in api.whoami(token="hf_member")["orgs"]] == ["lab"]
    for token, status in [("hf_wrong", 401), (False, 401), ("hf_reader", 403), ("hf_member", 403)]:
        with pytest.raises(HfHubHTTPError) as error:
            commit(api, {"config.json": b"{}"}, token=token)
        assert status_of(error) == status, token
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("lab/model")
    assert status_of(error) == 403
    assert api.create_repo("lab/model", token="hf_member").repo_id == "lab/model"
    assert len(hub.log(REPO)) == 1
    assert api.model_info(REPO, token=False).id == REPO  # a public repository is for everyone to read


def test_private_repository_looks_like_a_missing_one(hub: HubServer, api: HfApi) -> None:
    api.create_repo("me/secret", private=True)
    assert api.model_info("me/secret").private is True
    assert api.model_info("me/secret", token="hf_reader").private is True
    for repo in ("me/secret", "me/missing"):
        for token, status in [("hf_member", 404), (False, 401)]:
            with pytest.raises(RepositoryNotFoundError) as error:
                api.model_info(repo, token=token)
            assert status_of(error) == status
            with pytest.raises(RepositoryNotFoundError):
                hf_hub_download(repo, "config.json", endpoint=hub.url, token=token)


# Commits


def test_round_trip(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    made = commit(api, FILES)
    assert made.oid == hub.head(REPO) and made.repo_url.repo_id == REPO
    assert hub.files(REPO) == {".gitattributes": GIT_ATTRIBUTES, **FILES}
    assert [c.id for c in hub.log(REPO)] == [c.commit_id for c in api.list_repo_commits(REPO)]
    assert hub.log(REPO)[0].author == "me"
    assert hub.total("PUT") == (1, len(WEIGHTS))  # only the weights are LFS
    for path, data in FILES.items():
        local = hf_hub_download(REPO, path, endpoint=hub.url, token="hf_owner", cache_dir=tmp_path / "one")
        assert Path(local).read_bytes() == data
    root = snapshot_download(REPO, revision="main", endpoint=hub.url, token=False, cache_dir=tmp_path / "all")
    assert Path(root).name == made.oid
    assert {path: Path(root, path).read_bytes() for path in hub.files(REPO)} == hub.files(REPO)


def test_upload_from_a_path_with_several_large_files(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    files = {f"model-0000{i}-of-00003.safetensors": bytes([i]) * 2_000_000 for i in (1, 2, 3)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert hub.files(REPO) == {".gitattributes": GIT_ATTRIBUTES, **files}
    assert hub.total("PUT") == (3, 6_000_000)


def test_same_commit_again_sends_nothing(hub: HubServer, api: HfApi) -> None:
    made = commit(api, FILES)
    hub.requests.clear()
    assert commit(api, FILES).oid == made.oid
    assert hub.total("POST", "/commit/") == (0, 0)
    assert hub.total("PUT") == (0, 0)
    assert len(hub.log(REPO)) == 2


def test_object_known_to_the_repository_is_not_sent_to_another_branch(hub: HubServer, api: HfApi) -> None:
    commit(api, FILES)
    api.create_branch(REPO, branch="level", revision=hub.log(REPO)[-1].id)
    commit(api, FILES, revision="level")
    assert hub.total("PUT")[0] == 1
    assert hub.files(REPO, "level") == hub.files(REPO)
    assert hub.head(REPO, "level") != hub.head(REPO)


def test_deletions_and_additions_are_one_commit(hub: HubServer, api: HfApi) -> None:
    commit(api, FILES)
    operations = [
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("code/"),
        *additions({"codes": b"1"}),
    ]
    api.create_commit(REPO, operations, commit_message="title", commit_description="body")
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "config.json", "codes"}
    assert (hub.log(REPO)[0].title, hub.log(REPO)[0].message) == ("title", "body")
    before = hub.head(REPO)
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(REPO, [*additions({"new": b"1"}), CommitOperationDelete("missing")], commit_message="both")
    assert hub.head(REPO) == before and "new" not in hub.files(REPO)


def test_parent_commit_that_moved_is_refused(hub: HubServer, api: HfApi) -> None:
    parent = hub.head(REPO)
    moved = commit(api, {"config.json": b"1"}, parent_commit=parent).oid
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, {"config.json": b"2"}, parent_commit=parent)
    assert status_of(error) == 412
    assert hub.head(REPO) == moved
    with pytest.raises(RevisionNotFoundError):
        commit(api, {"config.json": b"2"}, revision="no-such-branch")


def test_object_must_have_the_hash_it_is_named_by(hub: HubServer, api: HfApi) -> None:
    headers = {"authorization": "Bearer hf_owner"}
    oid, wanted = hashlib.sha256(b"right").hexdigest(), {"size": 5}
    batch = httpx.post(
        f"{hub.url}/{REPO}.git/info/lfs/objects/batch", headers=headers, json={"objects": [{"oid": oid, **wanted}]}
    )
    actions = batch.json()["objects"][0]["actions"]
    assert httpx.put(actions["upload"]["href"], content=b"wrong").status_code == 400
    assert httpx.post(actions["verify"]["href"], headers=headers, json={"oid": oid, **wanted}).status_code == 404
    line = '{"key": "header", "value": {"summary": "s", "description": ""}}\n'
    line += f'{{"key": "lfsFile", "value": {{"path": "w.bin", "oid": "{oid}"}}}}\n'
    refused = httpx.post(f"{hub.url}/api/models/{REPO}/commit/main", headers=headers, content=line)
    assert refused.status_code == 400 and len(hub.log(REPO)) == 1
    assert httpx.put(actions["upload"]["href"], content=b"right", headers=headers).status_code == 400  # as S3
    assert httpx.put(actions["upload"]["href"], content=b"right").status_code == 200
    assert httpx.post(actions["verify"]["href"], headers=headers, json={"oid": oid, **wanted}).status_code == 200


def test_card_is_validated(hub: HubServer, api: HfApi) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(api, {"README.md": b"# No metadata\n"})
    with pytest.raises(ValueError, match="no closing ---"):
        commit(api, {"README.md": b"---\nlicense: mit\n"})


def test_commits_of_many_threads_are_one_line_of_history(hub: HubServer, api: HfApi) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: commit(api, {f"{i}.txt": b"%d" % i, f"{i}.bin": bytes([i]) * 1000}), range(8)))
    assert {c.id for c in hub.log(REPO)[:-1]} == {c.oid for c in made}
    assert len(hub.files(REPO)) == 17


# Reading


def test_listings_are_paged() -> None:
    with HubServer(page_size=2) as hub:
        api = HfApi(endpoint=hub.url, token="hf_owner")
        api.create_repo(REPO)
        commit(api, FILES)
        commit(api, {"config.json": b"2"})
        commit(api, {"config.json": b"3"})
        hub.requests.clear()
        assert [c.commit_id for c in api.list_repo_commits(REPO)] == [c.id for c in hub.log(REPO)]
        assert hub.total("GET", "/commits/")[0] == 2
        everything = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
        assert set(everything) == {*hub.files(REPO), "code"}
        assert hub.total("GET", "/tree/")[0] == 3
        assert everything["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
        assert everything["README.md"].size == len(CARD)
        assert {entry.path for entry in api.list_repo_tree(REPO)} == {p.split("/")[0] for p in hub.files(REPO)}
        assert [entry.path for entry in api.list_repo_tree(REPO, "code")] == ["code/model.py"]


def test_file_descriptions_agree(hub: HubServer, api: HfApi) -> None:
    commit(api, FILES)
    assert set(api.list_repo_files(REPO)) == set(hub.files(REPO))
    for sibling in api.model_info(REPO, files_metadata=True).siblings:
        assert sibling.size == len(hub.files(REPO)[sibling.rfilename])
    infos = api.get_paths_info(REPO, ["config.json", "code", "missing", "model.safetensors"])
    assert [info.path for info in infos] == ["code", "config.json", "model.safetensors"]
    data = FILES["config.json"]
    assert infos[1].blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert api.file_exists(REPO, "config.json") and not api.file_exists(REPO, "missing")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="missing")


def test_ranges(hub: HubServer, api: HfApi) -> None:
    commit(api, FILES)
    for path, data in FILES.items():
        for asked, part in [("bytes=2-5", data[2:6]), ("bytes=3-", data[3:]), ("bytes=-4", data[-4:])]:
            answer = httpx.get(f"{hub.url}/{REPO}/resolve/main/{path}", headers={"Range": asked}, follow_redirects=True)
            assert (answer.status_code, answer.content) == (206, part)
    assert httpx.get(f"{hub.url}/{REPO}/resolve/main/config.json", headers={"Range": "bytes=99-"}).status_code == 416


# Orders to misbehave


def test_fail_the_nth_call_which_the_client_repeats(hub: HubServer, api: HfApi) -> None:
    hub.fail("PUT", "/storage/", nth=2)
    commit(api, {"a.safetensors": b"a" * 1000, "b.safetensors": b"b" * 1000})
    assert sorted(r.status for r in hub.requests if r.method == "PUT") == [200, 200, 503]
    assert hub.files(REPO)["b.safetensors"] == b"b" * 1000


def test_failed_commit_is_not_repeated_by_the_client(hub: HubServer, api: HfApi) -> None:
    before = hub.head(REPO)
    for order in [{"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}]:
        hub.fail("POST", "/commit/", **order)
        with pytest.raises(HfHubHTTPError) as error:
            commit(api, FILES)
        assert status_of(error) == order["status"]
        assert error.value.response.headers.get("Retry-After") == order.get("headers", {}).get("Retry-After")
    assert hub.total("POST", "/commit/")[0] == 2
    assert hub.head(REPO) == before
    commit(api, FILES)
    assert hub.total("PUT") == (1, len(WEIGHTS))  # the weights of the first try are kept


@pytest.mark.slow
def test_retry_after_is_obeyed(hub: HubServer, api: HfApi) -> None:
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    commit(api, {"config.json": b"1"})
    assert time.monotonic() - start >= 1
    assert [r.status for r in hub.requests if "/preupload/" in r.path] == [429, 200]


def test_drop_in_the_middle_of_an_upload(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    size = 8_000_000
    (tmp_path / "w").write_bytes(b"w" * size)
    hub.drop("PUT")
    api.upload_file(path_or_fileobj=tmp_path / "w", path_in_repo="w.safetensors", repo_id=REPO)
    assert [(r.status, r.bytes_in) for r in hub.requests if r.method == "PUT"] == [(0, size // 2), (200, size)]
    assert hub.files(REPO)["w.safetensors"] == b"w" * size


def test_drop_of_a_commit_leaves_the_branch_alone(hub: HubServer, api: HfApi) -> None:
    before = hub.head(REPO)
    hub.drop("POST", "/commit/")
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        commit(api, {"config.json": b"1" * 1_000_000})
    assert hub.head(REPO) == before


def test_lost_answer_leaves_the_commit(hub: HubServer, api: HfApi) -> None:
    before = hub.head(REPO)
    hub.lose_answer("POST", "/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        commit(api, FILES, parent_commit=before)
    assert hub.log(REPO)[0].parent == before and hub.files(REPO)["model.safetensors"] == WEIGHTS
    assert commit(api, FILES, parent_commit=before).oid == hub.head(REPO)  # found to be there already: no 412
    assert hub.total("POST", "/commit/")[0] == 1


def test_upload_that_fails_for_good(hub: HubServer, api: HfApi) -> None:
    hub.fail("PUT", status=403, times=math.inf)
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'") as error:
        commit(api, FILES)
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert len(hub.log(REPO)) == 1
    hub.faults.clear()
    commit(api, FILES)
    assert len(hub.log(REPO)) == 2


def test_slow_and_on_request(hub: HubServer, api: HfApi) -> None:
    seen = []
    hub.on_request = lambda method, path: seen.append((method, path))
    hub.slow("GET", "/refs$", 0.2)
    start = time.monotonic()
    api.list_repo_refs(REPO)
    assert time.monotonic() - start >= 0.2
    assert seen == [("GET", f"/api/models/{REPO}/refs")]


def test_hang(hub: HubServer, api: HfApi) -> None:
    hub.hang("GET", "/refs$")
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{hub.url}/api/models/{REPO}/refs", timeout=0.3)
    assert httpx.get(f"{hub.url}/api/models/{REPO}/refs", timeout=30).status_code == 200


# Other processes

CLIENT = """
import sys
import torch
from transformers import AutoModelForCausalLM

repo, revision, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
with torch.no_grad():
    torch.save(model(torch.load(inputs)).logits, outputs)
"""

UPLOADER = """
import sys
from huggingface_hub import HfApi

HfApi().upload_file(path_or_fileobj=sys.argv[2].encode() * 1000, path_in_repo="w.bin", repo_id=sys.argv[1])
"""


@pytest.mark.slow
def test_transformers_loads_a_branch(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    api.create_branch(REPO, branch="sparsity-0.20")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model", revision="sparsity-0.20")
    inputs = torch.stack([block["input_ids"] for block in tiny_blocks(2)])
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", CLIENT, REPO, "sparsity-0.20", tmp_path / "inputs.pt", tmp_path / "logits.pt"],
        env={**os.environ, **hub.environment("hf_owner", str(tmp_path / "home"))},
        check=True,
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(inputs).logits, rtol=0, atol=0)


def test_client_killed_at_the_commit(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """Killed when the commit arrives: the weights are kept, the branch has not moved, and a rerun sends no weights."""
    command = [sys.executable, "-c", UPLOADER, REPO, "weights"]
    environment = {**os.environ, **hub.environment("hf_owner", str(tmp_path))}
    clients = []
    hub.on_request = lambda method, path: clients[0].kill() if "/commit/" in path else None
    hub.drop("POST", "/commit/")
    clients.append(subprocess.Popen(command, env=environment))
    assert clients[0].wait() == -9
    assert len(hub.log(REPO)) == 1 and hub.total("PUT") == (1, 7000)
    hub.on_request = lambda method, path: None
    subprocess.run(command, env=environment, check=True)
    assert hub.files(REPO)["w.bin"] == b"weights" * 1000 and hub.total("PUT") == (1, 7000)
