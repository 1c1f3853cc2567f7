"""An elastic checkpoint is every level of its run: in one file, and in one model that switches by views."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel

from gisp_hf import Trajectory, load_level
from gisp_hf.cli.main import main
from gisp_hf.config import level_name
from gisp_hf.levels.elastic import elastic_class, make_elastic, save_elastic, set_norms
from gisp_hf.models import modeling_elastic
from gisp_hf.models.families import FAMILIES as ROWS
from gisp_hf.models.families import SEPARATE
from gisp_hf.recovery.elastic import kept_inputs
from gisp_hf.recovery.elastic_file import write_elastic
from tests import toy_family
from tests.runs import prune, tiny_config
from tests.test_materialize import random_trajectory, save_base
from tests.tiny import FAMILIES, tiny_blocks, tiny_model, tiny_tokenizer

IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2, length=12)])
WALK = (0.5, 0.2, 0.37, 0.0, 0.5)  # sparsities, one after the other


def elastic_of(family: str = "llama", **changes) -> tuple[PreTrainedModel, Trajectory]:
    model = tiny_model(family, **changes)
    trajectory = random_trajectory(model, "some/base")
    return make_elastic(model, trajectory), trajectory


@pytest.fixture
def stored(tmp_path: Path) -> tuple[PreTrainedModel, Trajectory, Path]:
    model, trajectory = elastic_of()
    save_elastic(model, tmp_path / "elastic", trajectory=trajectory, tokenizer=tiny_tokenizer())
    return model, trajectory, tmp_path / "elastic"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def places(model: PreTrainedModel) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


# ---- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_is_the_level_there_and_shares_storage(family: str) -> None:
    model, trajectory = elastic_of(family)
    torch.testing.assert_close(logits(model), logits(tiny_model(family)))
    full = {name: parameter.clone() for name, parameter in model.named_parameters()}
    where = places(model)
    for sparsity in WALK:
        model.set_sparsity(sparsity)
        expected = tiny_model(family)
        if sparsity:
            trajectory.apply(expected, sparsity=sparsity)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert shapes == {name: parameter.shape for name, parameter in expected.named_parameters()}
        torch.testing.assert_close(logits(model), logits(expected))  # sums in another order: equal but for rounding
        assert places(model) == where and model.sparsity == sparsity
        for name, parameter in model.named_parameters():  # each is a prefix of the full one
            assert torch.equal(parameter, full[name][tuple(slice(0, length) for length in parameter.shape)]), name
        sliced = copy.deepcopy(model.at(sparsity))  # copies of its own, contiguous
        for parameter in sliced.parameters():
            parameter.data = parameter.data.contiguous()
        assert type(sliced) is type(expected)
        assert torch.equal(logits(sliced), logits(model))  # views change no bit
        for layer in model.model.layers:
            assert layer.mlp.intermediate_size == layer.mlp.gate_proj.out_features == len(layer.mlp.gate_proj.weight)
    for name, parameter in model.set_sparsity(0).named_parameters():
        assert torch.equal(parameter, full[name]), name


def test_a_level_beside_the_model_shares_its_weights() -> None:
    model, _ = elastic_of(tie_word_embeddings=True)
    level = model.at(0.5)
    where = places(model)
    assert all(where[name] == place for name, place in places(level).items())
    assert level.lm_head.weight is level.model.embed_tokens.weight
    before = logits(level)
    assert model.sparsity == 0 and places(model) == where  # as it was
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(logits(level), before)  # one storage
    model.set_sparsity(0.5)
    assert torch.equal(logits(model), logits(level))


def test_another_dtype_keeps_all_widths() -> None:
    model, trajectory = elastic_of()
    model.set_sparsity(0.4).double()
    expected = trajectory.apply(tiny_model(), sparsity=0.4).double()
    torch.testing.assert_close(logits(model), logits(expected))
    torch.testing.assert_close(logits(model.set_sparsity(0)), logits(tiny_model().double()))
    assert model.removal_order.dtype == torch.int32
    where = places(model)
    assert places(model.set_sparsity(0.5)) == where


def test_rounded_channels_are_prefixes_too() -> None:
    model = tiny_model()
    trajectory = random_trajectory(model, "some/base", channel_multiple=4)
    make_elastic(model, trajectory)
    for sparsity in (0.2, 0.33, 0.5):
        expected = trajectory.apply(tiny_model(), sparsity=sparsity)
        torch.testing.assert_close(logits(model.set_sparsity(sparsity)), logits(expected))
        channels = [layer.intermediate_size for layer in model.config.per_layer_config]
        assert channels == [layer.intermediate_size for layer in expected.config.per_layer_config]


def test_the_table_and_any_sparsity_agree_with_the_trajectory() -> None:
    model, trajectory = elastic_of()
    table = modeling_elastic.SizeTable(model.config.elastic, model.removal_order)
    for sparsity in torch.linspace(0.01, table.highest - 1e-3, 40).tolist():
        assert table.counts(sparsity) == [len(keep) for keep in trajectory.kept(sparsity)]
    assert table.highest == pytest.approx(trajectory.highest_sparsity())
    assert list(model.config.elastic["levels"]) == [f"{level:g}" for level in trajectory.config.sparsity_levels]
    for level, rows in model.config.elastic["levels"].items():
        counts = [rows[kind][layer] for layer, kind in table.blocks]
        assert counts == table.counts(float(level))


def test_constants_fit_the_table_of_families() -> None:
    for row in SEPARATE:
        found = [(projection.module, projection.dim) for projection in row.projections]
        assert found == list(modeling_elastic.PROJECTIONS[row.kind])
    for row in ROWS:
        if row.model_type != "toy":
            assert row.layers == modeling_elastic.LAYERS and row.blocks == SEPARATE
            assert any(c.pruned_model is row.pruned_model for c in modeling_elastic.ElasticModelMixin.__subclasses__())


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "gemma2", "gemma3_text"])
def test_saved_is_loaded_at_every_width(tmp_path: Path, family: str, tied: bool) -> None:
    model, trajectory = elastic_of(family, tie_word_embeddings=tied)
    folder = save_elastic(model.set_sparsity(0.5), tmp_path / "elastic", trajectory=trajectory)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model) and not loaded.training
    for sparsity in WALK:
        expected = logits(model.set_sparsity(sparsity))
        assert torch.equal(logits(loaded.set_sparsity(sparsity)), expected)
        if sparsity:
            part = AutoModelForCausalLM.from_pretrained(folder, sparsity=sparsity)
            assert torch.equal(logits(part), expected) and part.sparsity == sparsity
            assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in model.parameters())
            assert torch.equal(logits(part.set_sparsity(0.6)), logits(model.set_sparsity(0.6)))
            if tied:
                assert part.lm_head.weight is part.model.embed_tokens.weight


def test_it_is_a_checkpoint_of_the_unpruned_class(stored) -> None:
    """At full width, other programs can load it: only structures stand in another order."""
    _, _, folder = stored
    model = type(tiny_model()).from_pretrained(folder, config=tiny_model().config)
    torch.testing.assert_close(logits(model), logits(tiny_model()))


def test_a_level_reads_its_prefix_and_no_more(stored, monkeypatch) -> None:
    model, _, folder = stored
    read: list[torch.Tensor] = []

    class Counted:
        def __init__(self, path, **options) -> None:
            self.file = real(path, **options)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(self.file.get_tensor(name))
            return read[-1]

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Part:
                def get_shape(self):
                    return part.get_shape()

                def __getitem__(self, index):
                    read.append(part[index])
                    return read[-1]

            return Part()

    real = modeling_elastic.safe_open
    monkeypatch.setattr(modeling_elastic, "safe_open", Counted)
    part = AutoModelForCausalLM.from_pretrained(folder, sparsity=0.5, dtype=torch.bfloat16)
    weights = sum(parameter.numel() for parameter in part.parameters())
    assert sum(tensor.numel() for tensor in read) == weights + 2 * model.removal_order.numel()
    assert weights < sum(parameter.numel() for parameter in model.parameters())
    assert part.dtype == torch.bfloat16 and part.generation_config.to_dict() == model.generation_config.to_dict()


def test_shards_load_too(tmp_path: Path) -> None:
    model, _ = elastic_of()
    model.save_elastic(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    part = AutoModelForCausalLM.from_pretrained(tmp_path, sparsity=0.4)
    assert torch.equal(logits(part), logits(model.set_sparsity(0.4)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_width_is_the_level_that_the_run_saved(tmp_path: Path, tied: bool) -> None:
    """Bit for bit: structures stand in their original order again."""
    model = tiny_model(tie_word_embeddings=tied)
    base = save_base(model, tmp_path / "base")
    pruner = prune(model, tmp_path, config=tiny_config(channel_multiple=2))
    run = tmp_path / "levels"
    folder = write_elastic(run, tmp_path / "elastic", base_model=base)
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == (
        "modeling_elastic.ElasticLlamaForCausalLM"
    )
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(folder)("w5 w9")["input_ids"] == [5, 9]
    assert Trajectory.load(folder).digest() == Trajectory.load(run).digest()
    assert not (folder / "elastic.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for level in pruner.config.sparsity_levels:
        expected = AutoModelForCausalLM.from_pretrained(run / level_name(level))
        loaded.set_sparsity(level).save_pretrained(tmp_path / f"saved-{level}")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved-{level}")
        assert type(found) is type(expected)
        states = found.state_dict(), expected.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
        assert torch.equal(logits(found), logits(expected))
        configs = [
            json.loads((path / "config.json").read_text())
            for path in (tmp_path / f"saved-{level}", run / level_name(level))
        ]
        assert configs[0] == configs[1]
        part = AutoModelForCausalLM.from_pretrained(folder, sparsity=level)
        part.save_pretrained(tmp_path / f"part-{level}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"part-{level}")
        assert torch.equal(logits(again), logits(expected))
    between = load_level(run, sparsity=0.37, base_model=base)
    loaded.set_sparsity(0.37).save_pretrained(tmp_path / "between")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "between")
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in between.state_dict().items())
    loaded.set_sparsity(0).save_pretrained(tmp_path / "full")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert type(dense) is type(tiny_model())
    wanted = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in wanted.state_dict().items())


# ---- generation ------------------------------------------------------------------------------------------------------


def generate(model: PreTrainedModel, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mistral"])
def test_generation_after_every_switch(family: str) -> None:
    model, trajectory = elastic_of(family)
    for sparsity in (0.5, 0.2, 0.5):
        level = trajectory.apply(tiny_model(family), sparsity=sparsity)
        expected = generate(level)
        assert torch.equal(generate(model.set_sparsity(sparsity)), expected)
        assert torch.equal(generate(model, cache_implementation="static"), expected)


def test_a_cache_of_another_width_is_refused() -> None:
    model, _ = elastic_of()
    output = model.set_sparsity(0.2)(IDS[:, :6], use_cache=True)
    own = {key: value for key, value in output.items() if isinstance(value, Cache)}  # by the name that forward takes
    model.set_sparsity(0.5)
    with pytest.raises(ValueError, match=r"filled at sparsity 0.2, and the model is at sparsity 0.5 now; start with"):
        model(IDS[:, 6:7], **own)
    model.set_sparsity(0.2)
    continued = model(IDS[:, 6:], **own).logits  # back again: it fits
    torch.testing.assert_close(continued, model(IDS).logits[:, 6:])


def test_full_width_with_its_own_draft_gives_the_same_text() -> None:
    model, _ = elastic_of()
    ids = IDS[:1]
    expected = generate(model, ids)
    for sparsity in (0.2, 0.5):
        draft = model.at(sparsity)
        assert torch.equal(generate(model, ids, assistant_model=draft), expected)


def test_attention_implementation_can_be_changed() -> None:
    model, _ = elastic_of()
    expected = logits(model.set_sparsity(0.4))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), expected)
    attentions = model(IDS, output_attentions=True).attentions
    assert [a.shape[1] for a in attentions] == [c.num_attention_heads for c in model.config.per_layer_config]
    assert model.at(0.4).config._attn_implementation == "eager"


# ---- shared weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_shared_weights_and_those_of_the_unpruned_model(tmp_path: Path, apart: bool) -> None:
    model = tiny_model()
    trajectory = random_trajectory(model, "some/base")
    names = [name for name, _ in model.named_parameters() if "o_proj" in name or "down_proj" in name]
    shared = {name: model.get_parameter(name).detach() + 0.1 for name in names}
    make_elastic(model, trajectory, weights=shared, full_apart=apart)
    reference = tiny_model()
    for name in names:
        reference.get_parameter(name).data += 0.1
    folder = save_elastic(model, tmp_path / "elastic", trajectory=trajectory)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    trajectory = random_trajectory(reference, "some/base")  # the same order, of the changed weights
    for sparsity in (0.0, 0.5, 0.0, 0.2):
        if sparsity == 0:
            expected = tiny_model() if apart else reference
        else:
            expected = trajectory.apply(copy.deepcopy(reference), sparsity=sparsity)
        for elastic in (model, loaded, loaded.at(sparsity)):
            if hasattr(elastic, "set_sparsity"):
                elastic.set_sparsity(sparsity)
            torch.testing.assert_close(logits(elastic), logits(expected))
    loaded.set_sparsity(0).double()
    torch.testing.assert_close(logits(loaded), logits((tiny_model() if apart else reference).double()))
    part = AutoModelForCausalLM.from_pretrained(folder, sparsity=0.5)
    torch.testing.assert_close(logits(part), logits(model.set_sparsity(0.5)))
    assert len(part.state_dict()) == len(loaded.state_dict()) - (12 if apart else 0)


def test_the_command_shares_weights_and_says_so(tmp_path: Path, capsys) -> None:
    model = tiny_model()
    base = save_base(model, tmp_path / "base")
    prune(model, tmp_path, config=tiny_config(num_steps=2, sparsity_levels=(0.3, 0.5)))
    words = " ".join(f"w{4 + (7 * n) % 60}" for n in range(2000))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words}) + "\n")
    command = ["elastic", str(tmp_path / "levels"), "--base-model", str(base), "--tokens", "512"]
    command += ["--data", str(tmp_path / "text.jsonl"), "--output"]
    assert main([*command, str(tmp_path / "elastic")]) == 0
    assert "full width: mean relative error of the projections" in capsys.readouterr().out
    facts = json.loads((tmp_path / "elastic" / "elastic.json").read_text())
    assert facts["weights"] == {"0": 12.0, "0.3": 1.0, "0.5": 1.0}
    assert facts["errors"]["0.5"][1] < facts["errors"]["0.5"][0]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic")
    plain = AutoModelForCausalLM.from_pretrained(
        write_elastic(tmp_path / "levels", tmp_path / "plain", base_model=base)
    )
    keeps = kept_inputs(Trajectory.load(tmp_path / "levels"), 0.5)
    for name, parameter in trained.named_parameters():
        same = torch.equal(parameter, plain.get_parameter(name))
        assert same == (name not in keeps or bool(keeps[name].all())), name  # only inputs that a level lacks matter
    assert main([*command, str(tmp_path / "elastic")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "beyond"), "--levels", "0.9"]) == 2
    assert "lies beyond this trajectory" in capsys.readouterr().err and not (tmp_path / "beyond").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_impossible_sparsities_are_refused(stored) -> None:
    model, trajectory, folder = stored
    for sparsity in (-0.1, 1.0, 20):
        with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got"):
            model.set_sparsity(sparsity)
    with pytest.raises(ValueError, match="lies beyond this checkpoint, whose removal order ends at 0"):
        model.set_sparsity(0.95)
    assert model.sparsity == 0
    part = AutoModelForCausalLM.from_pretrained(folder, sparsity=0.4)
    with pytest.raises(ValueError, match=r"loaded with sparsity=0.4; load it with sparsity=0.2 or less"):
        part.set_sparsity(0.2)
    with pytest.raises(ValueError, match="its other weights cannot be saved; load it with sparsity=0"):
        part.save_elastic(folder.parent / "again")
    with pytest.raises(ValueError, match="lies beyond this checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder, sparsity=0.95)
    with pytest.raises(FileExistsError, match="exists already"):
        save_elastic(model, folder, trajectory=trajectory)


def test_a_family_with_fused_projections_is_refused() -> None:
    before = list(ROWS)
    toy_family.register()
    try:
        with pytest.raises(ValueError, match="ToyForCausalLM has no elastic class .* fused projections"):
            elastic_class(toy_family.toy_model())
    finally:
        ROWS[:] = before


def test_a_damaged_table_is_refused(stored) -> None:
    _, _, folder = stored
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in (("format", 2, "has format 2"), ("sizes", {"mlp": [1]}, "whole numbers above 0|kinds")):
        changed = {**config, "elastic": {**config["elastic"], key: value}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(Exception, match=message):  # Hugging Face's strict classes wrap the ValueError
            AutoModelForCausalLM.from_pretrained(folder)


# ---- remote code -----------------------------------------------------------------------------------------------------

REMOTE = """
import json, sys, torch
sys.modules["gisp_hf"] = None  # an import of it fails, as if it were not installed
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    part = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, sparsity=0.4)
    print(json.dumps(model.set_sparsity(0.4)(ids).logits.double().flatten().tolist()))
    assert torch.equal(part(ids).logits, model(ids).logits)
    model.save_pretrained(folder + "-level")
    level = AutoModelForCausalLM.from_pretrained(folder + "-level", trust_remote_code=True)
    torch.testing.assert_close(level(ids).logits, model(ids).logits)
    model.save_elastic(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).set_sparsity(0.4)
    assert torch.equal(again(ids).logits, model(ids).logits)
"""


@pytest.mark.slow
def test_remote_code_alone_is_enough(tmp_path: Path) -> None:
    folders, expected = [], []
    for family in FAMILIES:
        model, trajectory = elastic_of(family)
        norms = {name: p + 0.1 for name, p in model.named_parameters() if p.ndim == 1 and name.endswith(".weight")}
        set_norms(model, {0.5: norms})
        folders.append(str(save_elastic(model, tmp_path / f"elastic-{family}", trajectory=trajectory)))
        expected.append(logits(model.set_sparsity(0.4)))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, json.dumps(IDS.tolist()), *folders]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(expected)
    for line, found in zip(lines, expected):
        assert torch.equal(torch.tensor(line).float().view_as(found), found)
