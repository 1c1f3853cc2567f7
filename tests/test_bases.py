"""The base of a run: its names under wrappers, its devices, its revision, and a base that is itself pruned."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from gisp_hf import GISPPruner, Trajectory, load_level
from gisp_hf.criteria.base import share_out
from gisp_hf.criteria.taylor import Taylor
from gisp_hf.models import discover
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.models.shards import add_over_ranks, model_fingerprint, plain_parameters
from gisp_hf.models.surgery import slice_structures
from gisp_hf.training.identity import identify
from tests.runs import make_trainer, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model

IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2)])


# ---- wrappers --------------------------------------------------------------------------------------------------------


def wrapped_model():
    """Every layer in the wrapper that FSDP's activation checkpointing puts around it."""
    model = tiny_model()
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


def test_wrappers_change_names_and_ours_are_plain() -> None:
    model = wrapped_model()
    assert "_checkpoint_wrapped_module" in str([name for name, _ in model.named_parameters()])
    plain = dict(tiny_model().named_parameters())
    assert [name for name, _ in plain_parameters(model)] == list(plain)


def test_the_fingerprint_does_not_see_the_wrapper() -> None:
    assert model_fingerprint(plain_parameters(wrapped_model())) == fingerprint(tiny_model().named_parameters())


def test_a_wrapped_model_is_pruned_alike_and_gets_its_flags_back(tmp_path) -> None:
    expected = prune(tiny_model(), tmp_path / "plain").trajectory
    model = wrapped_model()
    odd = model.get_parameter("model.layers.3.mlp.up_proj.weight")
    odd.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    pruner = GISPPruner(tiny_config(sparsity_levels=(0.5,)), tmp_path / "levels", shrink=False)
    trainer = make_trainer(model, tmp_path, pruner=pruner)
    seen = []
    trainer.add_callback(_Flags(seen))
    trainer.train()
    assert seen[0] == set(pruner.engine.scored_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert pruner.trajectory.base.fingerprint == expected.base.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, expected.order))


class _Flags(TrainerCallback):
    def __init__(self, seen) -> None:
        self.seen = seen

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append({name for name, p in plain_parameters(model) if p.requires_grad})


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_scores_of_a_model_on_two_devices_are_brought_to_one() -> None:
    """Without two devices at hand: fake tensors check every operation for mixed devices, as real ones would."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = discover(tiny_model())
    with FakeTensorMode():
        sums = {}
        for number, block in enumerate(layout.blocks):
            for member in block.members:
                entries = torch.empty(block.size * member.width, device=f"meta:{block.layer // 3}")
                sums[number, member.parameter] = share_out(entries, member, block.size)
        assert {str(part.device) for part in sums.values()} == {"meta:0", "meta:1"}
        parts = add_over_ranks(list(sums.values()), None)
        assert {str(part.device) for part in parts} == {"meta:0"}
        torch.stack([(~part.isfinite()).sum() for part in parts])  # refuses two devices
        scores = Taylor().scores(layout, range(len(layout.blocks)), dict(zip(sums, parts)))
        assert {str(score.device) for score in scores} == {"meta:0"}


# ---- launchers -------------------------------------------------------------------------------------------------------


def test_layer_passes_under_accelerates_own_fsdp_are_accepted(tmp_path, monkeypatch) -> None:
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("gisp_hf.training.distributed.AcceleratorState", lambda: state)
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert not args.fsdp
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", layer_passes=2)
    pruner.prepare(args, tiny_model(), use_cache=None)
    assert len(pruner.engine.passes) == 2
    pruner.close()


# ---- revision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache with a model in one or more revisions."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)

    def add(commit: str, *, files=("config.json", "model.safetensors"), branch: str | None = None) -> None:
        repo = tmp_path / "hub" / "models--org--base"
        (repo / "snapshots" / commit).mkdir(parents=True)
        for name in files:
            (repo / "snapshots" / commit / name).write_bytes(commit.encode())
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        if branch:
            (repo / "refs" / branch).write_text(commit)

    return add


def revision_of(**options) -> str | None:
    options = {"name": "org/base", "revision": None, "hide_path": False, **options}
    return identify(tiny_model(), **options).revision


def test_the_only_cached_revision_is_recorded_whatever_its_branch(cache) -> None:
    cache("a" * 40, branch="experiment")
    assert revision_of() == "a" * 40


def test_a_revision_whose_config_alone_is_cached_does_not_count(cache) -> None:
    cache("a" * 40, branch="experiment")
    cache("b" * 40, files=("config.json",), branch="main")
    assert revision_of() == "a" * 40


def test_with_two_revisions_none_is_guessed_and_the_way_out_is_named(cache, caplog) -> None:
    cache("a" * 40, branch="main")
    cache("b" * 40, branch="experiment")
    assert revision_of() is None
    assert "in 2 revisions" in caplog.text and "base_revision" in caplog.text


def test_a_given_revision_is_recorded(cache) -> None:
    cache("a" * 40, branch="main")
    assert revision_of(revision="b" * 40) == "b" * 40


def test_a_model_that_is_not_in_the_cache_has_no_revision(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    assert revision_of() is None


# ---- a pruned base ---------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path):
    """A run, and a run on its level of 30 %."""
    first = prune(tiny_model(), tmp_path / "first", config=tiny_config(sparsity_levels=(0.3,)))
    base = first.level_folders[0.3]
    model = AutoModelForCausalLM.from_pretrained(base)
    second = prune(model, tmp_path / "second", config=tiny_config(sparsity_levels=(0.1, 0.2)))
    return base, second


def test_a_level_can_be_pruned_again_and_loaded_from_its_trajectory(chain) -> None:
    base, second = chain
    for level in (0.1, 0.2):
        saved = AutoModelForCausalLM.from_pretrained(second.level_folders[level])
        cut = load_level(second.output_dir, sparsity=level)  # the base is the folder that the trajectory names
        applied = second.trajectory.apply(AutoModelForCausalLM.from_pretrained(base), sparsity=level)
        assert torch.equal(cut(IDS).logits, saved(IDS).logits)
        assert torch.equal(applied(IDS).logits, saved(IDS).logits)


def test_the_survivors_of_a_chain_are_those_of_the_first_base(chain) -> None:
    base, second = chain
    kept = second.trajectory.kept(0.2)
    expected = copy.deepcopy(AutoModelForCausalLM.from_pretrained(base))
    slice_structures(expected, discover(expected), kept)
    saved = dict(AutoModelForCausalLM.from_pretrained(second.level_folders[0.2]).named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(saved[name], parameter), name


def test_the_unpruned_model_is_not_the_base_of_a_chain(chain, tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "unpruned")
    with pytest.raises(ValueError, match="Give the unpruned model, as it was before that run"):
        load_level(chain[1].output_dir, sparsity=0.1, base_model=tmp_path / "unpruned")


def test_a_pruned_base_is_named_and_its_sparsity_counts_from_the_unpruned_model(tmp_path, capsys) -> None:
    """Oracle: parameters of the decoder layers, counted in the models themselves."""

    def parameters(model) -> int:
        return sum(p.numel() for p in model.model.layers.parameters())

    first = prune(tiny_model(), tmp_path / "first", config=tiny_config(sparsity_levels=(0.3,)))
    base = AutoModelForCausalLM.from_pretrained(first.level_folders[0.3])
    at_start = parameters(base)
    capsys.readouterr()
    trainer = make_trainer(base, tmp_path / "second", config=tiny_config(sparsity_levels=(0.1, 0.2)))
    trainer.train()
    pruner = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, GISPPruner))
    total = parameters(tiny_model())
    note = capsys.readouterr().out.splitlines()[0]
    assert f"is pruned already: its decoder layers have {at_start:,} of {total:,} parameters" in note
    assert pruner.trajectory.base.unpruned == total and first.trajectory.base.unpruned is None
    assert pruner.trajectory.of_unpruned(0) == pytest.approx(1 - at_start / total)
    reached = 1 - parameters(base) / total
    assert trainer.state.log_history[-2]["sparsity_of_unpruned"] == pytest.approx(reached)
    for folder in (pruner.output_dir, pruner.level_folders[0.2]):
        again = Trajectory.load(folder)
        assert again.base == pruner.trajectory.base
        assert again.of_unpruned(again.highest_sparsity()) == pytest.approx(reached)
    assert first.trajectory.of_unpruned(0.3) == pytest.approx(0.3)
    third = prune(
        AutoModelForCausalLM.from_pretrained(pruner.level_folders[0.2]),
        tmp_path / "third",
        config=tiny_config(sparsity_levels=(0.1,)),
    )
    assert third.trajectory.base.unpruned == total  # of the first model, however long the chain


def test_the_file_of_an_unpruned_base_is_as_before(tmp_path) -> None:
    pruner = prune(tiny_model(), tmp_path, config=tiny_config(sparsity_levels=(0.3,)))
    facts = json.loads((pruner.output_dir / "trajectory.json").read_text())
    assert set(facts["base"]) == {"id", "revision", "fingerprint"}


@pytest.mark.parametrize("number", [-1, 1.5, "12", True, 100])
def test_an_odd_size_of_the_unpruned_model_is_refused(chain, number) -> None:
    folder = chain[1].output_dir
    facts = json.loads((folder / "trajectory.json").read_text())
    facts["base"]["unpruned"] = number  # 100: fewer than the base has itself
    (folder / "trajectory.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="base.unpruned must be a whole number from"):
        Trajectory.load(folder)


# ---- a model that a stopped run left ---------------------------------------------------------------------------------


class _Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def stopped(folder, **options):
    """(model, pruner) of a run that was stopped after three of five steps, outside the pruner."""
    model = tiny_model()
    model.name_or_path = "org/base"
    pruner = GISPPruner(tiny_config(), folder / "levels", **options)
    trainer = make_trainer(model, folder, pruner=pruner)
    trainer.add_callback(_Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return model, pruner


def test_a_model_whose_weights_do_not_match_its_config_is_refused(tmp_path) -> None:
    model, pruner = stopped(tmp_path / "first")
    number, block = next(
        (number, block)
        for number, block in enumerate(discover(model).blocks)
        if block.size < pruner.engine.layout.blocks[number].size
    )
    before = pruner.engine.layout.blocks[number].size
    with pytest.raises(ValueError, match=rf"{block.name} has {block.size} \w+, the config says {before}.*anew"):
        make_trainer(model, tmp_path / "second")
    assert not (tmp_path / "second" / "levels").exists()
    pruner.close()  # now its config says what it is
    second = prune(model, tmp_path / "third", config=tiny_config(sparsity_levels=(0.1,)))
    assert second.trajectory.base.id == "org/base, pruned in memory"
    assert second.trajectory.base.unpruned == pruner.engine.layout.total


def test_a_model_with_zeros_of_another_run_does_not_claim_its_base(tmp_path) -> None:
    model, pruner = stopped(tmp_path / "first", shrink=False)
    pruner.close()
    second = prune(model, tmp_path / "second", config=tiny_config(sparsity_levels=(0.5,)))
    assert second.trajectory.base.id == "org/base, pruned in memory"


def test_a_base_that_was_pruned_in_memory_is_not_looked_for_under_its_old_name(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "unpruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unpruned")
    prune(model, tmp_path / "first", config=tiny_config(sparsity_levels=(0.3,)))
    second = prune(model, tmp_path / "second", config=tiny_config(sparsity_levels=(0.1,)))
    with pytest.raises(FileNotFoundError, match=r"pruned in memory.*base_model= names"):
        load_level(second.output_dir, sparsity=0.1)
    saved = tmp_path / "first" / "levels" / "sparsity-0.30"
    cut = load_level(second.output_dir, sparsity=0.1, base_model=saved)
    assert torch.equal(cut(IDS).logits, model(IDS).logits)
