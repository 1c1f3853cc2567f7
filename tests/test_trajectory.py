import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from gisp_hf import Trajectory
from gisp_hf.pruning.trajectory import FACTS_FILE, ORDER_FILE
from tests.runs import LEVELS, prune
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prune(tiny_model("qwen2"), folder)
    return folder / "levels"


@pytest.fixture
def trajectory(folder) -> Trajectory:
    return Trajectory.load(folder)


def kept_sets(trajectory, sparsity, multiple) -> list[set[int]]:
    return [set(keep.tolist()) for keep in trajectory.kept(sparsity, channel_multiple=multiple)]


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_fifty_random_sparsities_are_nested(trajectory, multiple) -> None:
    highest = trajectory.highest_sparsity(channel_multiple=multiple)
    rng = random.Random(0)
    sparsities = sorted(rng.uniform(0.001, highest) for _ in range(50))
    kept = [kept_sets(trajectory, sparsity, multiple) for sparsity in sparsities]
    for larger, smaller in zip(kept, kept[1:]):
        assert all(b <= a for a, b in zip(larger, smaller))
    for sparsity, sets in zip(sparsities, kept):
        gone = sum((block.size - len(keep)) * block.cost for block, keep in zip(trajectory.layout.blocks, sets))
        assert gone / trajectory.layout.total >= sparsity - 1e-9
        for block, keep in zip(trajectory.layout.blocks, sets):
            assert keep and (block.kind == "attention" or len(keep) % multiple == 0 or len(keep) == block.size)


def test_prefix_is_the_shortest_that_reaches(trajectory) -> None:
    for sparsity in (0.01, 0.2, 0.333, 0.5):
        length = trajectory.prefix(sparsity)
        assert trajectory.sparsity_at(length) >= sparsity > trajectory.sparsity_at(length - 1)


@pytest.mark.parametrize(("sparsity", "multiple"), [(0.05, 1), (0.2, 1), (0.37, 1), (0.5, 1), (0.05, 8), (0.3, 8)])
def test_apply_at_any_sparsity_removes_what_it_says(trajectory, sparsity, multiple) -> None:
    model = trajectory.apply(tiny_model("qwen2"), sparsity=sparsity, channel_multiple=multiple)
    left = sum(parameter.numel() for parameter in model.model.layers.parameters())
    reached = trajectory.sparsity_at(trajectory.prefix(sparsity, channel_multiple=multiple), channel_multiple=multiple)
    assert left == trajectory.layout.total - round(reached * trajectory.layout.total)
    if multiple == 8:
        assert all(layer.mlp.up_proj.out_features % 8 == 0 for layer in model.model.layers)


def test_out_of_range(trajectory) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 1.5"):
        trajectory.kept(1.5)
    with pytest.raises(ValueError, match=r"sparsity 0.6 lies beyond this trajectory: it ends at 0\.5"):
        trajectory.apply(tiny_model("qwen2"), sparsity=0.6)
    with pytest.raises(ValueError, match="with channel_multiple=8; ask for less"):  # rounding gives too much back
        trajectory.apply(tiny_model("qwen2"), sparsity=0.5, channel_multiple=8)


def test_other_models_are_refused_and_left_alone(trajectory) -> None:
    for other, message in (
        (tiny_model("llama"), "made from .*qwen2"),
        (tiny_model("qwen2", intermediate_size=32), "Load the original, unpruned model"),
        (tiny_model("qwen2", seed=1), "the weights are not those of"),
        (trajectory.apply(tiny_model("qwen2"), sparsity=0.3), "Load the original, unpruned model"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            trajectory.apply(other, sparsity=0.3)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), other.state_dict().values()))


def test_another_dtype_of_the_base_is_the_base(trajectory) -> None:
    model = trajectory.apply(tiny_model("qwen2", dtype=torch.bfloat16), sparsity=0.3)
    expected = trajectory.apply(tiny_model("qwen2"), sparsity=0.3)
    for a, b in zip(model.parameters(), expected.parameters()):
        assert torch.equal(a, b.bfloat16())


def test_save_equals_load_byte_for_byte(trajectory, folder, tmp_path) -> None:
    trajectory.save(tmp_path)
    for name in (ORDER_FILE, FACTS_FILE):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    facts = json.loads((tmp_path / FACTS_FILE).read_text())
    assert facts["config"]["sparsity_levels"] == list(LEVELS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FACTS_FILE, ORDER_FILE]


def test_missing_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no trajectory.safetensors"):
        Trajectory.load(tmp_path)


def edit_facts(folder, **changes) -> None:
    facts = json.loads((folder / FACTS_FILE).read_text())
    (folder / FACTS_FILE).write_text(json.dumps({**facts, **changes}))


def edit_order(folder, change) -> None:
    order = load_file(folder / ORDER_FILE)
    change(order)
    save_file(order, folder / ORDER_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / ORDER_FILE).write_bytes(b"\x00" * 100), "cannot be used"),
        (lambda f: (f / FACTS_FILE).write_text("{"), "cannot be used"),
        (lambda f: edit_facts(f, format=99), "has format 99"),
        (lambda f: edit_facts(f, blocks=[]), "blocks of the two files differ"),
        (lambda f: edit_facts(f, total=5), "less than the blocks hold"),
        (lambda f: edit_facts(f, config={"levels": [0.1]}), "unknown keys levels"),
        (
            lambda f: edit_order(f, lambda r: r.update({"layers.1.mlp": torch.full((24,), -5, dtype=torch.int32)})),
            "order",
        ),
        (
            lambda f: edit_order(f, lambda r: r.update({"layers.1.mlp": torch.full((24,), 2**30, dtype=torch.int32)})),
            "order",
        ),
        (
            lambda f: edit_order(f, lambda r: r.update({"layers.1.mlp": torch.zeros(7, dtype=torch.int32)})),
            "int32 of shape",
        ),
        (lambda f: edit_order(f, lambda r: r.update({"layers.1.mlp": torch.zeros(24)})), "int32 of shape"),
        (lambda f: edit_order(f, lambda r: r.update({"../evil": torch.zeros(1)})), "differ: ../evil"),
    ],
)
def test_damaged_or_malicious_files_are_refused(damage, message, folder, tmp_path) -> None:
    Trajectory.load(folder).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Trajectory.load(tmp_path)
