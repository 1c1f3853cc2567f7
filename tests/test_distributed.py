"""Two processes equal one: real launches over gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gisp_hf  # noqa: F401
from gisp_hf import GISPPruner, Trajectory
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from gisp_hf.training.distributed import check_agreement
from tests.runs import LEVELS, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model

ROOT = Path(__file__).parents[1]


def launch(mode: str, folder: Path, *, processes: int, timeout: int = 240, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--module", "tests.distributed_run", mode, str(folder), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Trajectory, Path]:
    folder = tmp_path_factory.mktemp("single")
    pruner = prune(tiny_model(), folder, pruner=GISPPruner(tiny_config(), folder / "levels", shrink=False))
    return pruner.trajectory, folder / "levels"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_ddp_removes_what_one_process_removes(processes, tmp_path, single) -> None:
    expected, levels = single
    result = launch("ddp", tmp_path, processes=processes)
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, expected.order))
    assert [step.loss for step in found.steps] == pytest.approx([step.loss for step in expected.steps], rel=1e-5)
    for level in LEVELS:
        name = f"sparsity-{level:.2f}/model.safetensors"
        assert (tmp_path / "levels" / name).read_bytes() == (levels / name).read_bytes()
    facts = json.loads((tmp_path / "facts.json").read_text())
    # 5 pruning steps of 2 batches: gradients travel once a step, not once a batch
    assert facts == {"world": processes, "syncs": 5, "backward": 10, "wrapper": "DistributedDataParallel"}
    assert result.stdout.count("GISP step") + result.stderr.count("GISP step") == 5  # one process reports


@pytest.mark.slow
def test_prune_on_two_processes_removes_what_one_removes(tmp_path, single) -> None:
    expected, _ = single
    result = launch("ddp", tmp_path, processes=2, by_function=True)
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, expected.order))


@pytest.mark.slow
def test_the_fsdp2_launch_file_on_a_cpu_goes_as_far_as_accelerate_does(tmp_path, single) -> None:
    """Accelerate 1.15 does not shard on a CPU: it falls back to DDP, and the order is that of one process."""
    expected, _ = single
    settings = (ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text()
    (tmp_path / "cpu.yaml").write_text(settings.replace("num_processes: 8", "num_processes: 2\nuse_cpu: true"))
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(tmp_path / "cpu.yaml")]
    command += ["--module", "tests.distributed_run", "ddp", str(tmp_path), "{}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, expected.order))
    assert json.loads((tmp_path / "facts.json").read_text())["wrapper"] == "DistributedDataParallel"


@pytest.mark.slow
def test_where_bfloat16_orders_differ_only_near_ties_do(tmp_path, record_property) -> None:
    # In bfloat16 two processes sum other rounded numbers than one does. One step, so that a swap cannot lead to others.
    model = tiny_model(dtype=torch.bfloat16)
    engine = Engine(model, discover(model), tiny_config(num_steps=1), shrink=False)
    blocks = tiny_blocks(16)
    for half in (blocks[:8], blocks[8:]):
        ids = torch.stack([block["input_ids"] for block in half])
        (model(input_ids=ids, labels=ids).loss / 2).backward()
    with engine.watch():
        engine.accumulate()
    scores = torch.cat([score for score in engine.scores if score is not None])
    engine.advance(0.5)
    scored = [number for number, score in enumerate(engine.scores) if score is not None]
    result = launch("ddp", tmp_path, processes=2, dtype="bfloat16", num_steps=1)
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path / "levels")

    def ordered(order) -> torch.Tensor:
        """Our scores in the order of removal."""
        order = torch.cat([order[number] for number in scored])
        return scores[torch.where(order >= 0, order, order.max() + 1).argsort()[: int((order >= 0).sum())]]

    one, two = ordered(engine.order), ordered(found.order)
    gap = ((one[: len(two)] - two[: len(one)]).abs() / one[: len(two)]).max().item()
    record_property("largest relative difference of the scores that changed places", gap)
    print(f"largest relative difference of the scores that changed places: {gap:.4f}")
    assert gap < 0.02  # 0.0011 when last measured, of scores that spread over a factor of more than ten
    assert one.max() / one.min() > 10


@pytest.mark.slow
def test_a_rank_that_differs_stops_all_with_the_step(tmp_path) -> None:
    result = launch("ddp", tmp_path, processes=2, disturb={"kind": "differ", "rank": 1, "step": 3})
    assert result.returncode != 0
    assert result.stderr.count("DivergenceError: step 3: the processes chose different structures") == 2
    assert (tmp_path / "levels" / "sparsity-0.20").is_dir()  # what was saved before stays


@pytest.mark.slow
def test_a_rank_that_dies_brings_the_others_down(tmp_path) -> None:
    result = launch("ddp", tmp_path, processes=2, timeout=120, disturb={"kind": "die", "rank": 1, "step": 2})
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr


@pytest.mark.slow
def test_resume_under_ddp_and_under_another_number_of_processes(tmp_path, single) -> None:
    expected, _ = single
    saving = {"save_strategy": "steps", "save_steps": 1}
    result = launch("ddp", tmp_path, processes=2, disturb={"kind": "die", "rank": 0, "step": 4}, **saving)
    assert result.returncode != 0
    for processes in (2, 1):  # as many processes, then one: every step sees 16 examples in either case
        copy = tmp_path / f"resumed-{processes}"
        copy.mkdir()
        subprocess.run(["cp", "-r", str(tmp_path / "levels"), str(tmp_path / "trainer"), str(copy)], check=True)
        result = launch(
            "ddp", copy, processes=processes, resume_from_checkpoint=str(copy / "trainer" / "checkpoint-3"), **saving
        )
        assert result.returncode == 0, result.stderr
        found = Trajectory.load(copy / "levels")
        assert all(torch.equal(a, b) for a, b in zip(found.order, expected.order)), processes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_fsdp2_shards_give_the_order_of_one_process(family, tmp_path) -> None:
    model = tiny_model(family)
    engine = Engine(model, discover(model), tiny_config(sparsity_levels=(0.2, 0.4)), shrink=False)
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(16)])
    with engine.watch():
        for target in (0.1, 0.2, 0.3, 0.4):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            engine.accumulate()
            engine.advance(target)
    result = launch("fsdp2", tmp_path, processes=2, family=family)
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found.order, engine.order))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert len(facts["collectives"]) == 4  # one all-reduce a step, of scores: no parameter is gathered for scoring
    scores = sum(b.size * len(b.members) for b, least in zip(engine.layout.blocks, engine.minimum) if b.size > least)
    assert facts["collectives"][0] == scores
    level = tmp_path / "sparsity-0.40"
    assert len(list(level.glob("model-*.safetensors"))) > 1  # streamed, file by file
    loaded = AutoModelForCausalLM.from_pretrained(level)
    applied = found.apply(tiny_model(family), sparsity=0.4)
    for (name, a), b in zip(applied.named_parameters(), loaded.parameters()):
        assert torch.equal(a, b), name
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_one_process_has_nobody_to_disagree_with() -> None:
    check_agreement([torch.zeros(3, dtype=torch.int32)], step=1, device=torch.device("cpu"))


def test_layer_passes_are_refused_under_ddp(tmp_path, monkeypatch) -> None:
    from accelerate import Accelerator
    from transformers import TrainingArguments
    from transformers.training_args import ParallelMode

    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    pruner = GISPPruner(tiny_config(), tmp_path, layer_passes=2)
    with pytest.raises(ValueError, match="layer_passes=2 changes which parameters have a gradient, which DDP cannot"):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        Accelerator(cpu=True)  # the Trainer makes one
        pruner.prepare(args, tiny_model(), use_cache=None)
