import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import gisp_hf
from gisp_hf import GISPPruner, Trajectory
from gisp_hf.training import resume
from tests.runs import LEVELS, make_trainer, tiny_config
from tests.tiny import FAMILIES, tiny_blocks, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # kills, and whole runs one after the other


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


class Stop(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


SAVING = {"save_strategy": "steps", "save_steps": 1}


def start(folder: Path, *, shrink=None, resume=False, momentum=0.0, **changes):
    pruner = GISPPruner(tiny_config(num_steps=6, score_momentum=momentum), folder / "levels", shrink=shrink)
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
@pytest.mark.slow
@pytest.mark.parametrize("shrink", [True, False], ids=["shrink", "zeros"])
@pytest.mark.parametrize(("step", "moment"), [(1, "on_step_begin"), (3, "on_pre_optimizer_step"), (4, "on_step_end")])
def test_a_killed_run_ends_as_if_nothing_had_happened(step, moment, shrink, tmp_path, expected) -> None:
    kill_in_child(tmp_path, step, moment, shrink)
    _, train = start(tmp_path, shrink=shrink, resume=True)
    train()
    assert outputs(tmp_path) == expected


KILL_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback, TrainerState
from gisp_hf.pruning import trajectory
from gisp_hf.training import resume
from tests.test_resume import start

folder, moment, calls, armed = Path(sys.argv[1]), int(sys.argv[2]), 0, False

def counted(owner, name):
    plain = getattr(owner, name)
    def wrapper(*args, **kwargs):
        global calls
        calls += armed
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(owner, name, wrapper)

for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (trajectory, "save_file"),
                    (resume, "save_file"), (TrainerState, "save_to_json")):
    counted(owner, name)

class Arm(TrainerCallback):  # the checkpoint of step 3 is written right after this
    def on_log(self, args, state, control, **kwargs):
        global armed
        armed = state.global_step == 3

trainer, train = start(folder)
trainer.callback_handler.callbacks.insert(0, Arm())
train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 2, 3, 6, 9, 11, 12, 13, 19, 20, 21])
def test_a_kill_inside_a_checkpoint_leaves_a_whole_one(moment, tmp_path, expected) -> None:
    """The order's file, its sync and rename, the facts, the progress, the state, the renaming of the folder."""
    command = [sys.executable, "-c", KILL_WHILE_SAVING, str(tmp_path), str(moment)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    newest = max(path.name for path in (tmp_path / "trainer").iterdir() if path.name.startswith("checkpoint-"))
    assert newest == ("checkpoint-3" if moment == 21 else "checkpoint-2")
    _, train = start(tmp_path, resume=True)
    train()
    assert outputs(tmp_path) == expected


def stopped(folder: Path, step: int, **changes) -> None:
    """A run that ends by an error in the middle of a step, after so many whole ones."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    trainer, train = start(folder, **changes)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        train()


def test_a_moving_average_of_scores_goes_on_where_it_was(tmp_path) -> None:
    start(tmp_path / "whole", momentum=0.8)[1]()
    trainer, train = start(tmp_path / "cut", momentum=0.8)
    trainer.add_callback(Stop(3))
    with pytest.raises(RuntimeError, match="training ended after 3"):
        train()
    start(tmp_path / "cut", momentum=0.8, resume=True)[1]()
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["missing", "cut", "nan"])
def test_a_damaged_average_is_refused(damage, tmp_path) -> None:
    trainer, train = start(tmp_path, momentum=0.8)
    trainer.add_callback(Stop(2))
    with pytest.raises(RuntimeError, match="training ended after 2"):
        train()
    folder = tmp_path / "trainer" / "checkpoint-2"
    path = folder / resume.AVERAGES_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        averages = load_file(path)
        next(iter(averages.values()))[0] = float("nan")
        save_file(averages, path)
    assert resume.newest_checkpoint(tmp_path / "trainer").name == "checkpoint-1"
    with pytest.raises(ValueError, match="lacks scores.safetensors|is damaged"):
        resume.load_averages(folder, Trajectory.load(folder))


def test_checkpoints_hold_the_order_and_no_weights(tmp_path) -> None:
    start(tmp_path)[1]()
    folder = tmp_path / "trainer" / "checkpoint-4"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.pop("model.safetensors") < 300  # an empty file with a note
    assert set(sizes) == {"trajectory.json", "trajectory.safetensors", "gisp.json", "trainer_state.json", "config.json"}
    assert sorted(path.name for path in folder.parent.iterdir()) == [f"checkpoint-{step}" for step in range(1, 7)]


def test_a_checkpoint_is_no_model_and_says_so(tmp_path) -> None:
    stopped(tmp_path, 2)
    folder = tmp_path / "trainer" / "checkpoint-2"
    with pytest.raises(ValueError, match="model type `gisp_checkpoint`"):
        AutoModelForCausalLM.from_pretrained(folder)
    for _, model_class, _ in FAMILIES.values():
        with pytest.raises(StrictDataclassFieldValidationError, match="holds no weights: load the base model or a lev"):
            model_class.from_pretrained(folder)


def test_checkpoints_at_the_end_of_epochs_can_be_resumed_from(tmp_path, expected) -> None:
    every_epoch = {"save_strategy": "epoch"}  # 16 examples: an epoch is a step
    stopped(tmp_path, 4, **every_epoch)
    assert (tmp_path / "trainer" / "checkpoint-4" / "gisp.json").is_file()
    start(tmp_path, resume=True, **every_epoch)[1]()
    assert outputs(tmp_path) == expected


def test_old_checkpoints_are_removed_beyond_the_limit(tmp_path) -> None:
    start(tmp_path, save_total_limit=2)[1]()
    assert sorted(path.name for path in (tmp_path / "trainer").iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_a_broken_checkpoint_is_set_aside_by_name_and_the_one_before_is_taken(tmp_path, expected, caplog) -> None:
    stopped(tmp_path, 4)
    order = tmp_path / "trainer" / "checkpoint-4" / "trajectory.safetensors"
    order.write_bytes(order.read_bytes()[:-20])
    start(tmp_path, resume=True)[1]()
    assert outputs(tmp_path) == expected
    assert "checkpoint-4 is not whole" in caplog.text and "incomplete-checkpoint-4-1" in caplog.text
    assert (tmp_path / "trainer" / "incomplete-checkpoint-4-1" / "gisp.json").is_file()  # nothing is deleted


def test_prune_resumes_from_the_newest_whole_checkpoint(tmp_path, expected) -> None:
    stopped(tmp_path, 4)
    (tmp_path / "trainer" / "checkpoint-9").mkdir()  # of another program: no file of ours
    args = start(tmp_path)[0].args
    trainer = Trainer(tiny_model("qwen2"), args, train_dataset=tiny_blocks(16), processing_class=tiny_tokenizer())
    gisp_hf.prune(trainer, tiny_config(num_steps=6), tmp_path / "levels", resume_from_checkpoint=True)
    assert outputs(tmp_path) == expected


def test_prune_without_a_checkpoint_to_resume_from_says_so(tmp_path) -> None:
    args = start(tmp_path)[0].args
    trainer = Trainer(tiny_model("qwen2"), args, train_dataset=tiny_blocks(16))
    with pytest.raises(ValueError, match="holds no whole checkpoint of a pruning run"):
        gisp_hf.prune(trainer, tiny_config(num_steps=6), tmp_path / "levels", resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch, expected) -> None:
    write, calls = resume.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        with pytest.raises(OSError, match="No space left on device"):
            start(tmp_path)[1]()
    assert sorted(path.name for path in (tmp_path / "trainer").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    start(tmp_path, resume=True)[1]()
    assert outputs(tmp_path) == expected


# ---- checkpoints that do not fit -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    stopped(tmp_path, 4)
    return tmp_path / "trainer" / "checkpoint-4"


def load(folder: Path):
    facts = json.loads((folder / "gisp.json").read_text())
    return resume.load_progress(folder, resume.Progress(**facts))


def test_a_whole_checkpoint_is_read(checkpoint) -> None:
    assert len(load(checkpoint).steps) == 4


def test_a_cut_file_is_refused(checkpoint) -> None:
    order = checkpoint / "trajectory.safetensors"
    order.write_bytes(order.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged: the trajectory in .* cannot be used"):
        load(checkpoint)


def test_the_order_of_another_step_is_refused(checkpoint) -> None:
    other = checkpoint.with_name("checkpoint-3") / "trajectory.safetensors"
    (checkpoint / "trajectory.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="is damaged: its removal order is not the one it was saved with"):
        load(checkpoint)


def test_a_checkpoint_of_another_program_is_refused(checkpoint) -> None:
    (checkpoint / "gisp.json").rename(checkpoint / "other.json")
    with pytest.raises(ValueError, match="holds no gisp.json"):
        resume.load_progress(checkpoint, resume.Progress(4, 1, 16, 1, ""))


def test_another_number_of_examples_is_refused(checkpoint, tmp_path) -> None:
    with pytest.raises(ValueError, match="made with examples_per_step=16.*this run has 8"):
        start(tmp_path, resume=True, per_device_train_batch_size=4)[1]()


def test_other_settings_are_refused(checkpoint, tmp_path) -> None:
    facts = checkpoint / "trajectory.json"
    edited = json.loads(facts.read_text())
    edited["config"]["num_steps"] = 9
    facts.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="made with another GISPConfig"):
        start(tmp_path, resume=True)[1]()


def test_another_base_is_refused(checkpoint, tmp_path) -> None:
    pruner = GISPPruner(tiny_config(num_steps=6), tmp_path / "levels")
    trainer = make_trainer(tiny_model("qwen2", seed=1), tmp_path, pruner=pruner, **SAVING)
    with pytest.raises(ValueError, match="the weights are not those of"):
        trainer.train(resume_from_checkpoint=True)


def test_a_lost_level_is_refused(checkpoint, tmp_path) -> None:
    (tmp_path / "levels" / "sparsity-0.20").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="beyond sparsity-0.20, but .* is gone"):
        start(tmp_path, resume=True)[1]()


def test_a_finished_run_is_not_begun_again(tmp_path) -> None:
    start(tmp_path)[1]()
    with pytest.raises(FileExistsError, match="is not empty"):
        start(tmp_path)[1]()
