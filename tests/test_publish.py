"""Push while pruning goes on: the callback, the cards and the uploader together, against a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gisp_hf import GISPPruner
from gisp_hf.hub import PushError, read_levels
from gisp_hf.training.identity import identify
from tests.hub_server import HubServer
from tests.runs import LEVELS, make_trainer, tiny_config
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]

RUN = """
import json, sys
from pathlib import Path
from gisp_hf import GISPPruner
from tests.runs import prune, tiny_config
from tests.tiny import tiny_model
folder = Path(sys.argv[1])
pruner = GISPPruner(
    tiny_config(), folder / "levels", hub_model_id="me/tiny-gisp", base_model="org/tiny",
    evaluate=lambda model: {"parameters": float(sum(p.numel() for p in model.parameters()))},
)
prune(tiny_model(), folder, pruner=pruner)
print(json.dumps(dict(pruner.push_report.commits)))
"""

LOAD = """
import sys, torch
sys.modules["gisp_hf"] = None
from transformers import AutoModelForCausalLM
for revision in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained("me/tiny-gisp", revision=revision, trust_remote_code=True)
    print(revision, sum(p.numel() for p in model.parameters()))
"""


def python(code: str, *arguments: str, hub: HubServer, home: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        **hub.environment("hf_owner", str(home)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_run_leaves_all_levels_and_a_card_on_the_hub(tmp_path) -> None:
    with HubServer(tokens={"hf_owner": "me"}) as hub:
        result = python(RUN, str(tmp_path), hub=hub, home=tmp_path / "home")
        assert result.returncode == 0, result.stderr
        commits = json.loads(result.stdout.splitlines()[-1])
        names = [f"sparsity-{level:.2f}" for level in LEVELS]
        assert list(commits) == [*names, "main"]
        assert all(hub.head("me/tiny-gisp", branch) == commit for branch, commit in commits.items())
        for name in names:  # one commit a level, after the repository's first one
            assert len(hub.log("me/tiny-gisp", name)) == 2
            pushed, folder = hub.files("me/tiny-gisp", name), tmp_path / "levels" / name
            local = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert {file: data for file, data in pushed.items() if file != ".gitattributes"} == local
            assert b"base_model: org/tiny" in pushed["README.md"] and "hf_owner" not in str(pushed["README.md"])
        main = hub.files("me/tiny-gisp", "main")
        table = json.loads(main["levels.json"])
        assert {name: entry["commit"] for name, entry in table["levels"].items()} == {
            name: commits[name] for name in names
        }
        assert b"sparsity-0.40" in main["README.md"] and "trajectory.safetensors" in main
        assert "hf_owner" not in result.stdout + result.stderr

        # another push of the finished folder changes nothing
        hub.requests.clear()
        again = python(
            "import sys; from gisp_hf.cli.main import main; sys.exit(main(sys.argv[1:]))",
            *("push", str(tmp_path / "levels"), "--repo", "me/tiny-gisp"),
            hub=hub,
            home=tmp_path / "home",
        )
        assert again.returncode == 0, again.stderr
        changed = [name for name in [*names, "main"] if hub.head("me/tiny-gisp", name) != commits[name]]
        assert not changed
        assert hub.total("PUT", ".*")[0] == 0

        loaded = python(LOAD, *names, "main", hub=hub, home=tmp_path / "other-home")
        assert loaded.returncode == 0, loaded.stderr
        hub.requests.clear()
        offline = python(LOAD, *names, hub=hub, home=tmp_path / "other-home", HF_HUB_OFFLINE="1")
        assert offline.returncode == 0, offline.stderr
        assert offline.stdout in loaded.stdout and not hub.requests  # from the cache alone
        sizes = dict(line.split() for line in loaded.stdout.splitlines() if line.startswith(("sparsity", "main")))
        assert sizes["main"] == sizes[names[0]] and int(sizes[names[0]]) > int(sizes[names[3]])
        assert [float(sizes[name]) for name in names] == [
            level.metrics["parameters"] for level in read_levels_of(hub, tmp_path)
        ]


def read_levels_of(hub: HubServer, folder: Path):
    code = (
        "import json; from gisp_hf.hub import read_levels\n"
        "print(json.dumps([dict(level.metrics) for level in read_levels('me/tiny-gisp')]))"
    )
    result = python(code, hub=hub, home=folder / "third-home")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout.splitlines()[-1])

    class Level:
        def __init__(self, values) -> None:
            self.metrics = values

    return [Level(values) for values in metrics]


def test_a_wrong_token_is_refused_before_anything_is_computed(tmp_path, monkeypatch) -> None:
    with HubServer(tokens={"hf_owner": "me"}) as hub:
        import gisp_hf.hub.stage as publish

        real = publish.LevelUploader
        monkeypatch.setattr(publish, "LevelUploader", lambda *a, **k: real(*a, **k, endpoint=hub.url))
        pruner = GISPPruner(tiny_config(), tmp_path / "levels", hub_model_id="me/x", hub_token="hf_wrong_secret")
        trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner)
        with pytest.raises(PushError) as refused:
            trainer.train()
        assert "me/x" in str(refused.value) and "hf_wrong_secret" not in str(refused.value)
        assert trainer.state.global_step == 0
        pruner = GISPPruner(tiny_config(), tmp_path / "levels", hub_model_id="not a name", hub_token="hf_owner")
        with pytest.raises(ValueError):
            make_trainer(tiny_model(), tmp_path, pruner=pruner).train()


def test_a_local_base_is_pushed_under_its_name_without_its_path(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "secret-place" / "my-model")
    model = tiny_model()
    model.name_or_path = str(tmp_path / "secret-place" / "my-model")
    local, pushed = (identify(model, name=None, revision=None, hide_path=hide) for hide in (False, True))
    assert local.id == model.name_or_path  # where load_level finds it again
    assert pushed.id == "my-model"


def test_a_failed_push_never_loses_the_levels(tmp_path, monkeypatch) -> None:
    import gisp_hf.hub.stage as publish

    with HubServer(tokens={"hf_owner": "me"}) as hub:
        real = publish.LevelUploader
        monkeypatch.setattr(
            publish, "LevelUploader", lambda *a, **k: real(*a, **k, endpoint=hub.url, wait=lambda seconds: None)
        )
        pruner = GISPPruner(tiny_config(), tmp_path / "levels", hub_model_id="me/x", hub_token="hf_owner")
        trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner)
        hub.fail(method="POST", path_regex="/commit/", times=float("inf"), status=403)
        with pytest.raises(PushError, match="gisp-hf push"):
            trainer.train()
        hub.faults.clear()
        names = [f"sparsity-{level:.2f}" for level in LEVELS]
        assert [info.name for info in read_levels(tmp_path / "levels")] == names
        from gisp_hf.hub import push_levels

        report = push_levels(tmp_path / "levels", "me/x", token="hf_owner", endpoint=hub.url)
        assert list(report.commits) == [*names, "main"]
