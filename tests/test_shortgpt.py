"""ShortGPT: whole layers by block influence, as plain checkpoints with fewer layers."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf import GISPConfig, GISPPruner, Trajectory, load_level
from gisp_hf.criteria.block_influence import BlockInfluence
from gisp_hf.criteria.magnitude import Magnitude
from gisp_hf.criteria.taylor import Taylor
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.levels.info import read_levels
from gisp_hf.levels.materialize import materialize
from gisp_hf.models import discover
from gisp_hf.models.surgery import pruned_shell, slice_structures, zero_structures
from gisp_hf.pruning.engine import Engine
from gisp_hf.pruning.methods import METHODS, Method, register_method
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.test_distributed import launch
from tests.tiny import FAMILIES, tiny_blocks, tiny_model, tiny_tokenizer

KEPT = (4, 4, 3, 3)  # of 6 layers, at LEVELS: two levels each end at the same number


def tokens(count: int = 4) -> torch.Tensor:
    return torch.stack([block["input_ids"] for block in tiny_blocks(count)])


def kept(*stay: int, of: int = 6) -> list[torch.Tensor]:
    return [torch.arange(int(layer in stay)) for layer in range(of)]


def config(**changes) -> GISPConfig:
    return tiny_config(**{"method": "shortgpt", "num_steps": 1, "protect_first": 0, "protect_last": 0, **changes})


def states(model, ids: torch.Tensor, **inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, the hidden states before and after it: (B, T, d)."""
    seen = []
    handles = [
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for handle in handles:
        handle.remove()
    return seen


def influences(model, ids: torch.Tensor) -> list[float]:
    """1 - cosine, token by token, in Python's own numbers."""
    found = []
    for before, after in states(model, ids):
        total = 0.0
        for x, y in zip(before.flatten(0, 1).tolist(), after.flatten(0, 1).tolist()):
            product = sum(a * b for a, b in zip(x, y))
            total += 1 - product / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
        found.append(total / before[..., 0].numel())
    return found


def scored(model, *batches: torch.Tensor, **inputs) -> Engine:
    engine = Engine(model, discover(model, ("layer",)), config(sparsity_levels=(0.2,)))
    model.train()
    with engine.watch():
        for ids in batches:
            model(input_ids=ids, labels=ids, **inputs).loss.backward()
        engine.accumulate()
    return engine


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


# ---- the score -------------------------------------------------------------------------------------------------------


def test_block_influence_equals_its_definition(family) -> None:
    model, ids = tiny_model(family), tokens()
    engine = scored(model, ids[:1], ids[1:])
    assert torch.cat(engine.scores).tolist() == pytest.approx(influences(model, ids), rel=1e-4)


def test_a_layer_of_zeros_has_no_influence_and_a_state_of_zeros_has_a_half() -> None:
    model = tiny_model()
    zero_structures(model, discover(model, ("layer",)).blocks[2], torch.tensor([0]))
    assert scored(model, tokens()).scores[2].item() == 0.0
    half = BlockInfluence().statistics(torch.tensor([[0.0, 0.0, 3.0, 4.0]]))
    assert half.tolist() == [0.5, 1.0]


def test_padding_and_passes_of_an_evaluation_do_not_count() -> None:
    model, ids = tiny_model(), tokens()
    expected = scored(tiny_model(), ids).scores
    padded = torch.cat([ids, torch.zeros_like(ids[:, :5])], dim=1)
    engine = Engine(model, discover(model, ("layer",)), config(sparsity_levels=(0.2,)))
    with engine.watch():
        model.eval()
        model(ids.flip(1))
        model.train()
        with torch.no_grad():
            model(ids.flip(1))
        with pytest.raises(ValueError, match="model.layers.0 has seen no training pass"):
            engine.accumulate()
        model(input_ids=padded, attention_mask=(padded > 0).long())
        engine.accumulate()
    torch.testing.assert_close(engine.scores, expected)


def test_block_influence_of_parts_of_a_layer_is_refused() -> None:
    model = tiny_model()
    watching = BlockInfluence().watch(model, discover(model))
    with pytest.raises(ValueError, match=r"scores whole layers, and layers.0.attention.*kinds=\('layer',\)"), watching:
        pass


# ---- surgery ---------------------------------------------------------------------------------------------------------


def test_every_parameter_of_a_layer_belongs_to_its_one_structure(family) -> None:
    model = tiny_model(family)
    layout = discover(model, ("layer",))
    for block, layer in zip(layout.blocks, model.model.layers, strict=True):
        assert (block.kind, block.size, block.module) == ("layer", 1, f"model.layers.{block.layer}")
        assert block.cost == sum(p.numel() for p in layer.parameters())
    assert layout.total == discover(model).total == sum(block.cost for block in layout.blocks)


@pytest.mark.parametrize("stay", [(0, 2, 3, 5), (1, 4), (5,), (0, 1, 2, 3, 4, 5)])
def test_mask_equals_slice_equals_a_model_without_the_layers(family, stay) -> None:
    masked, sliced, plain = tiny_model(family), tiny_model(family), tiny_model(family)
    layout, ids = discover(masked, ("layer",)), tokens(3)
    for block in layout.blocks:
        if block.layer not in stay:
            zero_structures(masked, block, torch.tensor([0]))
    before = dict(sliced.named_parameters())
    slice_structures(sliced, layout, kept(*stay))
    torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-5)

    # The oracle: hooks that hand the input of a layer on, in a model that nothing was done to.
    for number, layer in enumerate(plain.model.layers):
        if number not in stay:
            layer.register_forward_hook(lambda _, args, output: args[0])
    torch.testing.assert_close(sliced(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    names = layout.renamed(kept(*stay))
    for old, parameter in before.items():
        new = names.get(old, old)
        if new is None:
            assert parameter.numel() == 0  # its memory is free
        else:
            assert sliced.get_parameter(new) is parameter
    assert [layer.self_attn.layer_idx for layer in sliced.model.layers] == list(range(len(stay)))
    shell = pruned_shell(tiny_model(family), layout, [len(keep) for keep in kept(*stay)])
    assert type(shell) is type(tiny_model(family)) and shell.config.to_dict() == sliced.config.to_dict()
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (shell, sliced)]
    assert shapes[0] == shapes[1]


def test_slicing_twice_equals_slicing_once_and_the_layouts_agree(family) -> None:
    once, twice = tiny_model(family), tiny_model(family)
    layout = discover(once, ("layer",))
    slice_structures(once, layout, kept(1, 4))
    slice_structures(twice, layout, kept(1, 3, 4))
    now = layout.reduced(kept(1, 3, 4))
    slice_structures(
        twice, now, [torch.arange(int(layer in (1, 4)) * block.size) for layer, block in enumerate(now.blocks)]
    )
    for (name, a), b in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert once.config.to_dict() == twice.config.to_dict()
    found, reduced = discover(once, ("layer",)), layout.reduced(kept(1, 4))
    assert [block.members for block in found.blocks] == [block.members for block in reduced.blocks if block.size]
    assert found.total == reduced.total


def test_a_sliding_window_stays_with_its_layer() -> None:
    sliced = tiny_model("gemma3_text")
    types = sliced.config.layer_types
    slice_structures(sliced, discover(sliced, ("layer",)), kept(3, 4, 5))
    assert sliced.config.layer_types == types[3:] and len(set(types[3:])) == 2


@pytest.mark.parametrize("stay", [(0, 1), (4, 5), (2, 3)])
def test_a_model_without_one_type_of_attention_generates_as_the_saved_one(stay, tmp_path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}  # layers 3 to 5
    model, ids = tiny_model("qwen2", **sliding), tokens(2)
    slice_structures(model, discover(model, ("layer",)), kept(*stay))
    model.save_pretrained(tmp_path / "short")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert loaded.config.layer_types == ["sliding_attention" if n > 2 else "full_attention" for n in stay]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    found, expected = (m.generate(ids, max_new_tokens=24, do_sample=False) for m in (model, loaded))
    assert torch.equal(found, expected)


def test_a_model_whose_layers_were_pruned_before_keeps_their_sizes(tmp_path) -> None:
    first = prune(tiny_model(), tmp_path / "gisp", config=tiny_config(sparsity_levels=(0.3,))).level_folders[0.3]
    base = AutoModelForCausalLM.from_pretrained(first)
    run = prune(copy.deepcopy(base), tmp_path / "run", config=config(sparsity_levels=(0.4,)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "levels" / "sparsity-0.40")
    expected = copy.deepcopy(base)
    slice_structures(expected, discover(expected, ("layer",)), run.trajectory.kept(0.4))
    assert type(loaded) is type(base) and torch.equal(loaded(tokens(2)).logits, expected(tokens(2)).logits)
    cut = load_level(
        tmp_path / "run" / "levels", sparsity=0.4, base_model=tmp_path / "gisp" / "levels" / "sparsity-0.30"
    )
    assert torch.equal(cut(tokens(2)).logits, loaded(tokens(2)).logits)


def test_a_shorter_level_can_be_pruned_further(tmp_path) -> None:
    short = prune(tiny_model(), tmp_path / "short", config=config(sparsity_levels=(0.3,))).level_folders[0.3]
    model = AutoModelForCausalLM.from_pretrained(short)
    further = prune(model, tmp_path / "gisp", config=tiny_config(sparsity_levels=(0.2,), protect_first=0))
    level = further.level_folders[0.2]
    cut = load_level(level.parent, sparsity=0.2, base_model=short)
    assert len(cut.model.layers) == 4 and type(cut).__name__ == "GispLlamaForCausalLM"
    assert torch.equal(cut(tokens(2)).logits, AutoModelForCausalLM.from_pretrained(level)(tokens(2)).logits)


# ---- a run -----------------------------------------------------------------------------------------------------------


def run_in(folder: Path, family: str = "llama", *, base=None, **changes) -> GISPPruner:
    """A run whose base lies in ``folder/base``."""
    base = base or tiny_model(family)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    shrink = changes.pop("shrink", None)
    pruner = GISPPruner(config(**changes), folder / "levels", shrink=shrink, base_model=str(folder / "base"))
    return prune(copy.deepcopy(base), folder, pruner=pruner)


def test_the_layers_with_the_lowest_influence_go_first(tmp_path) -> None:
    model = tiny_model()
    expected = influences(model, tokens(16))
    pruner = run_in(tmp_path, base=model)
    assert GISPConfig(method="shortgpt").num_steps == 1
    order = [int(positions) for positions in pruner.trajectory.order]
    lowest = sorted(range(6), key=lambda layer: expected[layer])[:3]
    assert order == [lowest.index(layer) if layer in lowest else -1 for layer in range(6)]
    (step,) = pruner.trajectory.steps
    assert step.removed == {"layer": 3} and step.sparsity == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2", "gemma3_text"])
def test_levels_load_everywhere_and_are_the_same(family, steps, tmp_path) -> None:
    """Saved = cut from the base's files = applied = saved by a run that keeps zeros; with the cache too."""
    pruner = run_in(tmp_path, family, num_steps=steps)
    zeros = run_in(tmp_path / "zeros", family, num_steps=steps, shrink=False)
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, zeros.trajectory.order))
    base, trajectory = tiny_model(family), Trajectory.load(tmp_path / "levels")
    ids = tokens(2)
    for level, layers in zip(LEVELS, KEPT):
        name = f"sparsity-{level:.2f}"
        folder = tmp_path / "levels" / name
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert type(saved) is type(base) and saved.config.num_hidden_layers == len(saved.model.layers) == layers
        removed = 1 - sum(p.numel() for p in saved.model.layers.parameters()) / trajectory.layout.total
        assert removed == pytest.approx(trajectory.sparsity_at(trajectory.prefix(level))) and removed >= level - 1e-9
        models = [
            load_level(tmp_path / "levels", sparsity=level),
            trajectory.apply(copy.deepcopy(base), sparsity=level),
            AutoModelForCausalLM.from_pretrained(tmp_path / "zeros" / "levels" / name),
        ]
        text = saved.generate(ids, max_new_tokens=24, do_sample=False)
        for model in models:
            assert type(model) is type(base)
            assert torch.equal(model(ids).logits, saved(ids).logits)
            assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), text)
        assert torch.equal(saved.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False), text)
        assert not list(folder.glob("*.py")) and not {"per_layer_config", "auto_map"} & set(
            read(folder / "config.json")
        )
        cut = materialize(tmp_path / "levels", tmp_path / "cut" / name, sparsity=level)
        for file in ("model.safetensors", "config.json", "generation_config.json", "trajectory.safetensors"):
            assert (cut / file).read_bytes() == (folder / file).read_bytes()
        found, expected = read(cut / "trajectory.json"), read(folder / "trajectory.json")
        # while a level is saved, the Trainer has not logged the loss of the step yet
        assert [step["step"] for step in found.pop("steps")] == [step["step"] for step in expected.pop("steps")]
        assert found == expected


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_model_of_a_run_is_the_last_level(tmp_path) -> None:
    model = tiny_model()
    sizes = []

    def evaluate(pruned) -> dict[str, int]:
        sizes.append(len(pruned.model.layers))
        return {"parameters": sum(p.numel() for p in pruned.parameters())}

    model.model.layers[1].requires_grad_(False)  # the flags of a layer stay with it
    frozen = set(map(id, model.model.layers[1].parameters()))
    pruner = GISPPruner(config(), tmp_path / "levels", evaluate=evaluate)
    prune(model, tmp_path, pruner=pruner)
    saved = AutoModelForCausalLM.from_pretrained(pruner.level_folders[0.5])
    assert sizes == list(KEPT) and type(model) is type(saved)
    assert torch.equal(model(tokens(2)).logits, saved(tokens(2)).logits)
    assert pruner.level_metrics[0.5]["parameters"] == saved.num_parameters()
    assert [id(p) for p in model.parameters() if not p.requires_grad and id(p) not in frozen] == []
    assert not any(p.requires_grad for p in model.parameters() if id(p) in frozen)
    assert [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks] == []


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [Taylor, Magnitude])
def test_other_criteria_can_score_layers_in_several_steps(criterion, tmp_path) -> None:
    register_method("by-layer", Method(criterion, num_steps=5, kinds=("layer",)))
    try:
        sliced, zeros = (
            run_in(tmp_path / str(shrink), method="by-layer", num_steps=5, shrink=shrink).trajectory
            for shrink in (True, False)
        )
    finally:
        del METHODS["by-layer"]
    assert all(torch.equal(a, b) for a, b in zip(sliced.order, zeros.order)) and len(sliced) == 3


def test_steps_after_the_last_layer_that_may_go_change_nothing(tmp_path) -> None:
    """At 0.55 of 6 layers the fourth goes before the last step, and two are protected."""
    pruner = run_in(tmp_path, num_steps=20, sparsity_levels=(0.55,), protect_first=1, protect_last=1)
    assert len(pruner.trajectory) == 4 and pruner.trajectory.steps[-1].removed == {"layer": 0}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(tmp_path) -> None:
    """After step 3 of 5 (target 0.3) a third of the layers is gone, and no level beyond 0.3 has been saved."""

    def start(folder: Path, **arguments) -> GISPPruner:
        pruner = GISPPruner(config(num_steps=5, sparsity_levels=(0.2, 0.32, 0.5)), folder / "levels", base_model="tiny")
        arguments = {"save_strategy": "steps", "save_steps": 1, **arguments}
        trainer = make_trainer(tiny_model(), folder, pruner=pruner, **arguments)
        trainer.train(resume_from_checkpoint=bool(arguments.get("resume_from_checkpoint")))
        return pruner

    expected = start(tmp_path / "whole")
    assert expected.trajectory.steps[2].sparsity > 0.32
    evaluated = []

    def stop(model) -> dict[str, float]:
        evaluated.append(len(model.model.layers))
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return {}

    folder = tmp_path / "killed"
    pruner = GISPPruner(
        config(num_steps=5, sparsity_levels=(0.2, 0.32, 0.5)), folder / "levels", base_model="tiny", evaluate=stop
    )
    trainer = make_trainer(tiny_model(), folder, pruner=pruner, save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    found = start(folder, resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(found.trajectory.order, expected.trajectory.order))
    assert list(found.level_folders) == list(expected.level_folders)
    for level in (0.2, 0.32, 0.5):
        a, b = (run.level_folders[level] / "model.safetensors" for run in (found, expected))
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_a_level_loads_where_the_package_is_not_installed(tmp_path) -> None:
    run_in(tmp_path, sparsity_levels=(0.5,))
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'levels' / 'sparsity-0.50')!r})\n"
        "assert 'gisp_hf' not in sys.modules\n"
        "print(type(model).__name__, len(model.model.layers), model(torch.arange(9)[None]).logits.sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / "sparsity-0.50")
    total = model(torch.arange(9)[None]).logits.sum().item()
    name, layers, found = done.stdout.split()[-3:]
    assert (name, int(layers), float(found)) == ("LlamaForCausalLM", 3, pytest.approx(total))


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_remove_what_one_removes(tmp_path) -> None:
    expected = prune(tiny_model(), tmp_path / "one", config=tiny_config(method="shortgpt"))
    result = launch("ddp", tmp_path, processes=2, method="shortgpt")
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, expected.trajectory.order)) and len(found) == 3
    for level in LEVELS:
        name = f"sparsity-{level:.2f}/model.safetensors"
        assert (tmp_path / "levels" / name).read_bytes() == (tmp_path / "one" / "levels" / name).read_bytes()


@pytest.mark.slow
def test_sharded_parameters_give_the_levels_of_one_process(tmp_path) -> None:
    model, ids = tiny_model(), tokens(16)
    settings = tiny_config(sparsity_levels=(0.2, 0.4), method="shortgpt")
    engine = Engine(model, discover(model, ("layer",)), settings)
    model.train()
    with engine.watch():
        for target in (0.1, 0.2, 0.3, 0.4):
            model(input_ids=ids)
            engine.accumulate()
            engine.advance(target)
    result = launch("fsdp2", tmp_path, processes=2, family="llama", method="shortgpt")
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(a, b) for a, b in zip(Trajectory.load(tmp_path).order, engine.order))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sparsity-0.40")
    assert type(saved) is type(model) and torch.equal(saved(ids).logits, model.eval()(ids).logits)


# ---- what people read ------------------------------------------------------------------------------------------------


def test_cards_speak_of_layers_and_need_nothing_but_transformers(tmp_path) -> None:
    trajectory = run_in(tmp_path, sparsity_levels=(0.2, 0.5)).trajectory
    levels = read_levels(tmp_path / "levels")
    main = main_card(trajectory, levels, repo_id="me/short")
    text = level_card(trajectory, levels[1], repo_id="me/short")
    assert "3 of 6 decoder layers are gone" in text and "whole decoder layers are taken out," in main
    for card in (main, text):
        load = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
        assert load.startswith("from transformers import AutoModelForCausalLM")
        assert "trust_remote_code" not in card and "modeling_gisp" not in card and "differ in size" not in card
        assert "\n\n\n" not in card
    rows = re.findall(r"^\| ([\d-]+) \| (\d) of 1 \|$", text.split("## What is left in each layer")[1], re.MULTILINE)
    left = [int(len(keep)) for keep in trajectory.kept(0.5)]
    for numbers, amount in rows:
        first, _, last = numbers.partition("-")
        assert {left[layer] for layer in range(int(first), int(last or first) + 1)} == {int(amount)}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_multiple": 8}, "channel_multiple=8 rounds the number of channels, but only layers are removed"),
        ({"prune": "heads"}, "prune='heads' leaves nothing to remove: method 'shortgpt' removes layer"),
        ({"method": "gisp", "prune": "layer"}, "prune='layer' leaves nothing.*'gisp' removes attention, mlp"),
        ({"sparsity_levels": (0.9,)}, "sparsity 0.9 cannot be reached.*the highest is 0.8333"),
        ({"sparsity_levels": (0.7,), "protect_first": 2, "protect_last": 1}, "the highest is 0.5000"),
        ({"minimum_kept": {"layer": 1}}, r"minimum_kept=\{layer: 1\}.*the highest is 0.0000"),
        ({"sparsity_levels": (0.1, 0.2, 0.3, 0.4), "protect_first": 3}, "4 sparsity levels.*only 3 can go"),
    ],
)
def test_requests_that_cannot_be_met(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_model(), tmp_path, config=config(**changes))


def test_channels_of_a_level_without_layers_cannot_be_rounded(tmp_path) -> None:
    run_in(tmp_path, sparsity_levels=(0.5,))
    with pytest.raises(ValueError, match="channel_multiple=64 rounds the number of channels, but only layers"):
        load_level(tmp_path / "levels", sparsity=0.5, channel_multiple=64)


def test_kinds_that_do_not_fit_are_refused() -> None:
    for kinds in (("layer", "mlp"), ("experts",), ()):
        with pytest.raises(ValueError, match="has no structures of the kinds .*attention, mlp, .*alone: layer"):
            discover(tiny_model(), kinds)


def test_a_base_with_layers_missing_is_refused(tmp_path) -> None:
    trajectory = run_in(tmp_path).trajectory
    shorter = trajectory.apply(tiny_model(), sparsity=0.2)
    with pytest.raises(ValueError, match="the model given is llama with 4 layers"):
        trajectory.apply(shorter, sparsity=0.2)
    del shorter.model.layers[0]
    with pytest.raises(ValueError, match="has 3 decoder layers, and its config says 4"):
        discover(shorter)
