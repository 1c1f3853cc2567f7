import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from gisp_hf import GISPPruner
from tests.runs import LEVELS, make_trainer, tiny_config
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]


class Kill(TrainerCallback):
    """kill -9 at a moment of a step."""

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment

    def __getattribute__(self, name):
        if name.startswith("on_") and name == object.__getattribute__(self, "moment"):
            return self.strike
        return object.__getattribute__(self, name)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


SAVING = {"save_strategy": "steps", "save_steps": 1}


def start(folder: Path, *, shrink=None, resume=False, **changes):
    pruner = GISPPruner(tiny_config(num_steps=6), folder / "levels", shrink=shrink)
    trainer = make_trainer(tiny_model("qwen2"), folder, pruner=pruner, **{**SAVING, **changes})
    return trainer, lambda: trainer.train(resume_from_checkpoint=resume)


def kill_in_child(folder: Path, step: int, moment: str, shrink: bool) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.test_resume import start, Kill\n"
        "folder, step, moment, shrink = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == 'True'\n"
        "trainer, train = start(folder, shrink=shrink)\n"
        "trainer.add_callback(Kill(step, moment))\n"
        "train()\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(step), moment, str(shrink)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr


def outputs(folder: Path) -> dict[str, bytes]:
    levels = folder / "levels"
    names = ["trajectory.json", "trajectory.safetensors"]
    names += [f"sparsity-{level:.2f}/{name}" for level in LEVELS for name in ("model.safetensors", "config.json")]
    return {name: (levels / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    start(folder)[1]()
    return outputs(folder)


@pytest.mark.slow
@pytest.mark.parametrize("shrink", [True, False], ids=["shrink", "zeros"])
@pytest.mark.parametrize(
    ("step", "moment"), [(1, "on_step_begin"), (3, "on_pre_optimizer_step"), (4, "on_step_end"), (5, "on_save")]
)
def test_a_killed_run_ends_as_if_nothing_had_happened(step, moment, shrink, tmp_path, expected) -> None:
    kill_in_child(tmp_path, step, moment, shrink)
    _, train = start(tmp_path, shrink=shrink, resume=True)
    train()
    assert outputs(tmp_path) == expected


def test_checkpoints_hold_the_order_and_no_weights(tmp_path) -> None:
    start(tmp_path)[1]()
    folder = tmp_path / "trainer" / "checkpoint-4"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes["model.safetensors"] < 300  # an empty file with a note
    assert not [name for name in sizes if name.startswith("model-")]
    assert {"trajectory.json", "trajectory.safetensors", "gisp.json", "trainer_state.json"} <= set(sizes)
    weights = sum(p.numel() * p.element_size() for p in tiny_model("qwen2").parameters())
    assert sizes["optimizer.pt"] < 0.1 * weights  # no moments: the optimizer never saw a gradient


@pytest.fixture
def killed(tmp_path):
    kill_in_child(tmp_path, 4, "on_step_begin", True)
    return tmp_path


def test_damaged_and_foreign_checkpoints_are_refused(killed) -> None:
    folder = killed / "trainer" / "checkpoint-4"
    order, facts, progress = (folder / name for name in ("trajectory.safetensors", "trajectory.json", "gisp.json"))
    kept = {path: path.read_bytes() for path in (order, facts, progress)}

    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            start(killed, resume=True, **changes)[1]()
        for path, data in kept.items():
            path.write_bytes(data)

    order.write_bytes(kept[order][:-20])
    refused("is damaged: the trajectory in .* cannot be used")
    order.write_bytes((killed / "trainer" / "checkpoint-3" / "trajectory.safetensors").read_bytes())
    refused("is damaged: its removal order is not the one it was saved with")
    progress.unlink()
    refused("holds no gisp.json")
    refused("made with examples_per_step=16.*this run has 8", per_device_train_batch_size=4)
    edited = json.loads(kept[facts])
    edited["config"]["num_steps"] = 9
    facts.write_text(json.dumps(edited))
    refused("made with another GISPConfig")


def test_another_base_or_a_lost_level_is_refused(killed) -> None:
    pruner = GISPPruner(tiny_config(num_steps=6), killed / "levels")
    trainer = make_trainer(tiny_model("qwen2", seed=1), killed, pruner=pruner, **SAVING)
    with pytest.raises(ValueError, match="the weights are not those of"):
        trainer.train(resume_from_checkpoint=True)
    (killed / "levels" / "sparsity-0.20").rename(killed / "elsewhere")
    with pytest.raises(ValueError, match="beyond sparsity-0.20, but .* is gone"):
        start(killed, resume=True)[1]()


def test_a_finished_run_is_not_begun_again(tmp_path) -> None:
    start(tmp_path)[1]()
    with pytest.raises(FileExistsError, match="is not empty"):
        start(tmp_path)[1]()
