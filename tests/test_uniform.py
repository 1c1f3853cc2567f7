"""Layers of one size: the levels of ``layout="uniform"`` are plain models of their family."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from gisp_hf import GISPConfig, GISPPruner, Trajectory, load_level
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.levels.info import read_levels
from gisp_hf.levels.materialize import materialize
from gisp_hf.models import discover
from gisp_hf.models.plain import find_plain_sizes
from gisp_hf.pruning.engine import Engine
from gisp_hf.pruning.selection import kept_counts, removed_masks, removed_parameters
from gisp_hf.pruning.uniform import select_rounds
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.test_selection import fresh_order, toy_layout
from tests.tiny import FAMILIES, tiny_blocks, tiny_model


def uniform_config(**changes) -> GISPConfig:
    return tiny_config(**{"layout": "uniform", "protect_first": 0, **changes})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.stack([block["input_ids"] for block in tiny_blocks(4)])).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_are_plain_models_and_compute_what_the_masked_ones_do(family, tmp_path) -> None:
    base = tiny_model(family)
    pruner = prune(copy.deepcopy(base), tmp_path, config=uniform_config())
    trajectory = pruner.trajectory
    before = None
    for level in LEVELS:
        folder = pruner.level_folders[level]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(base) and type(loaded.config) is type(base.config)
        facts = json.loads((folder / "config.json").read_text())
        assert "per_layer_config" not in facts and "auto_map" not in facts
        assert not list(folder.glob("*.py"))
        layout = discover(loaded)
        assert len({block.size for block in layout.blocks if block.kind == "mlp"}) == 1
        assert len({block.size for block in layout.blocks if block.kind == "attention"}) == 1
        gone = 1 - layout.total / discover(base).total
        assert gone >= level - 1e-9 and gone == pytest.approx(trajectory.sparsity_at(trajectory.prefix(level)))
        kept = [set(keep.tolist()) for keep in trajectory.kept(level)]
        assert before is None or all(now <= then for now, then in zip(kept, before))
        before = kept
        # the oracle: the unpruned model with zeros in the weights of all that is gone
        masked = copy.deepcopy(base)
        with torch.no_grad():
            for block, keep in zip(trajectory.layout.blocks, kept):
                for member in block.members:
                    weight = masked.get_parameter(member.parameter)
                    for index in set(range(block.size)) - keep:
                        weight.narrow(member.dim, index * member.width, member.width).zero_()
        assert torch.allclose(logits(loaded), logits(masked), atol=1e-4)


def test_rounds_take_the_lowest_of_every_layer_and_share_one_ranking() -> None:
    """By hand: two layers, attention of cost 10 a group, channels of cost 3."""
    layout, order = toy_layout(), fresh_order(toy_layout())
    scores = [
        torch.tensor(values)
        for values in ([5.0, 1.0], [0.5, 9.0, 2.0, 8.0], [7.0, 4.0], [3.0, 4.0, 0.1, 9.0])  # means of groups: 2.5, 6
    ]
    everything = {"minimum": [1, 1, 1, 1], "limit": 10**6}
    # channels: 0.3, 2.5, 6, 9; the second round is as good as that of the groups, which come first
    rounds = [[(1, 0), (3, 2)], [(0, 1), (2, 1)], [(1, 2), (3, 0)], [(1, 3), (3, 1)]]
    for budget, count in ((6, 1), (7, 2), (26, 2), (27, 3), (33, 4), (10**6, 4)):
        chosen = select_rounds(layout, scores, order, budget=budget, **everything)
        assert chosen == [pair for pairs in rounds[:count] for pair in pairs]
    # groups would pass the next level at 20, so that channels go on
    chosen = select_rounds(layout, scores, order, minimum=[1, 1, 1, 1], budget=18, limit=20)
    assert chosen == [pair for pairs in (rounds[0], *rounds[2:]) for pair in pairs]
    # the next step starts where this one ended
    for place, (number, index) in enumerate(chosen):
        order[number][index] = place
    assert select_rounds(layout, scores, order, budget=18, **everything) == []
    assert select_rounds(layout, scores, order, budget=19, **everything) == rounds[1]


def test_layers_keep_what_the_fullest_of_them_keeps() -> None:
    layout = toy_layout(sizes=((4, 8), (4, 8), (4, 8)))
    ordered = [3, 5, 2, 6, 3, 8]
    assert kept_counts(layout, ordered, {}) == [1, 3, 2, 2, 1, 0]
    assert kept_counts(layout, ordered, {}, uniform=True) == [2, 3, 2, 3, 2, 3]
    assert kept_counts(layout, ordered, {"mlp": 2}, uniform=True) == [2, 4, 2, 4, 2, 4]
    plain = replace(layout, plain_sizes={"attention": (1, 4)})
    assert kept_counts(plain, ordered, {}, uniform=True) == [4, 3, 4, 3, 4, 3]
    order = fresh_order(layout)
    order[0][2], order[2][1], order[2][3], order[4][0] = 0, 1, 2, 3
    masks = removed_masks(layout, order, length=4, multiples={}, uniform=True)
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[2], [], [1], [], [0], []]
    assert removed_parameters(layout, order, length=4, multiples={}, uniform=True) == 30
    assert removed_parameters(layout, order, length=3, multiples={}, uniform=True) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_that_the_family_loads(family) -> None:
    """The oracle: build the family's own config of every size."""
    model = tiny_model(family)
    layout = discover(model)
    found = find_plain_sizes(model, layout)
    fitting = []
    for groups in range(1, layout.blocks[0].size + 1):
        heads = model.config.num_attention_heads // layout.blocks[0].size * groups
        facts = {**model.config.to_dict(), "head_dim": 4, "num_attention_heads": heads, "num_key_value_heads": groups}
        try:
            type(model.config)(**facts)
            fitting.append(groups)
        except StrictDataclassError:
            pass
    assert found.get("attention", tuple(range(1, layout.blocks[0].size + 1))) == tuple(fitting)
    assert "mlp" not in found
    if family in ("llama", "llama_bias", "gemma2", "gemma3_text"):
        assert found["attention"] == (1, 2, 4)  # 6 heads do not divide a hidden size of 32


@pytest.mark.slow
@pytest.mark.parametrize(("family", "multiple"), [("llama", 1), ("qwen3", 8)])
def test_zeros_files_and_a_level_cut_from_the_base_are_the_same(family, multiple, tmp_path) -> None:
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    config = uniform_config(channel_multiple=multiple)
    runs = []
    for shrink in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        pruner = GISPPruner(config, tmp_path / str(shrink) / "levels", shrink=shrink)
        runs.append(prune(model, tmp_path / str(shrink), pruner=pruner))
    sliced, zeros = runs
    assert all(torch.equal(a, b) for a, b in zip(sliced.trajectory.order, zeros.trajectory.order))
    again = Trajectory.load(tmp_path / "True" / "levels")
    assert again.layout.plain_sizes == sliced.trajectory.layout.plain_sizes and again.config == config
    for level in LEVELS:
        first = AutoModelForCausalLM.from_pretrained(sliced.level_folders[level])
        assert first.config.intermediate_size % multiple == 0
        others = [
            AutoModelForCausalLM.from_pretrained(zeros.level_folders[level]),
            load_level(tmp_path / "True" / "levels", sparsity=level),
            again.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), sparsity=level),
            AutoModelForCausalLM.from_pretrained(
                materialize(tmp_path / "True" / "levels", tmp_path / f"cut{level}", sparsity=level)
            ),
        ]
        for other in others:
            assert type(other) is type(base) and type(other.config) is type(base.config)
            assert other.state_dict().keys() == first.state_dict().keys()
            assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
            assert torch.equal(logits(other), logits(first))
    coarser = load_level(tmp_path / "True" / "levels", sparsity=0.2, channel_multiple=12)
    assert coarser.config.intermediate_size % 12 == 0 and type(coarser) is type(base)


@pytest.mark.slow
def test_levels_load_where_gisp_hf_is_not_installed(tmp_path) -> None:
    folder = prune(tiny_model(), tmp_path, config=uniform_config()).level_folders[0.5]
    code = (
        "import sys; sys.modules['gisp_hf'] = None; from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(folder)!r}); print(type(model).__module__, model.num_parameters())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert done.stdout.split() == ["transformers.models.llama.modeling_llama", str(parameters)]


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise InterruptedError

    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = prune(tiny_model(), tmp_path / "whole", config=uniform_config())
    trainer = make_trainer(tiny_model(), tmp_path / "stopped", config=uniform_config(), **saving)
    trainer.add_callback(Stop())
    with pytest.raises(InterruptedError):
        trainer.train()
    make_trainer(tiny_model(), tmp_path / "stopped", config=uniform_config(), **saving).train(
        resume_from_checkpoint=True
    )
    for level in LEVELS:
        name = f"levels/sparsity-{level:.2f}"
        for file in ("model.safetensors", "config.json", "trajectory.safetensors"):
            assert (tmp_path / "stopped" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert whole.trajectory.digest() == Trajectory.load(tmp_path / "stopped" / "levels").digest()


def test_the_model_of_a_finished_run_is_plain_and_can_be_pruned_again(tmp_path) -> None:
    model = tiny_model()
    prune(model, tmp_path / "first", config=uniform_config(sparsity_levels=(0.2,)))
    assert type(model) is LlamaForCausalLM and not model.config.is_heterogeneous
    pruner = prune(model, tmp_path / "second", config=tiny_config(sparsity_levels=(0.2,)))
    loaded = AutoModelForCausalLM.from_pretrained(pruner.level_folders[0.2])
    assert type(loaded).__name__ == "GispLlamaForCausalLM"
    with pytest.raises(ValueError, match="layout='uniform' needs layers of one size; this model has .* groups"):
        Engine(loaded, discover(loaded), uniform_config())


def test_layers_of_full_size_and_one_size_for_all_exclude_each_other() -> None:
    config = GISPConfig(layout="uniform")
    assert (config.protect_first, config.protect_last) == (0, 0)
    assert GISPConfig(method="gisp-uniform") == replace(config, method="gisp-uniform")
    assert GISPConfig.from_dict(config.to_dict()) == config
    assert (GISPConfig().layout, GISPConfig().protect_first, GISPConfig().protect_last) == ("free", 0.1, 1)
    with pytest.raises(ValueError, match="protect_last=1 keeps layers at full size.*leave protect_last out"):
        GISPConfig(layout="uniform", protect_last=1)
    with pytest.raises(ValueError, match="layout must be one of free, uniform, got 'square'"):
        GISPConfig(layout="square")


def test_a_level_that_no_plain_model_reaches_is_refused() -> None:
    model = tiny_model()
    config = uniform_config(prune="heads", sparsity_levels=(0.1, 0.5))
    with pytest.raises(ValueError, match=r"sparsity 0.5 cannot be reached.*layout='uniform' the highest is 0\.\d+"):
        Engine(model, discover(model), config)


def test_a_damaged_file_is_refused(tmp_path) -> None:
    prune(tiny_model(), tmp_path, config=uniform_config())
    path = tmp_path / "levels" / "trajectory.json"
    facts = json.loads(path.read_text())
    assert facts["plain_sizes"] == {"attention": [1, 2, 4]}
    for sizes in ([], [2, 1, 4], [1, 2], [1, 5], [0, 4], "4", [1, 4.0]):
        path.write_text(json.dumps(facts | {"plain_sizes": {"attention": sizes}}))
        with pytest.raises(ValueError, match="plain_sizes"):
            Trajectory.load(tmp_path / "levels")


def test_cards_of_plain_levels_ask_for_no_code(tmp_path) -> None:
    pruner = prune(tiny_model(), tmp_path, config=uniform_config())
    levels = read_levels(tmp_path / "levels")
    for text in (
        main_card(pruner.trajectory, levels, repo_id="me/x"),
        level_card(pruner.trajectory, levels[0], repo_id="me/x"),
    ):
        assert "import gisp_hf" not in text and "trust_remote_code" not in text
        assert "Nothing but transformers is needed" in text and "\n\n\n" not in text
