"""Levels load through every Auto class that their family has, with the package and by their own code alone."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)
from transformers.generation.continuous_batching.utils import find_num_key_value_heads

import gisp_hf  # noqa: F401  teaches the Auto classes the pruned checkpoints
from gisp_hf.models import modeling_gisp
from tests.runs import prune, tiny_config
from tests.test_golden import GOLDEN
from tests.tiny import FAMILIES, tiny_blocks, tiny_model

HEADS = {
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
    "AutoModelForTokenClassification": AutoModelForTokenClassification,
}
IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2, length=12)])


@pytest.fixture(scope="module", params=FAMILIES)
def level(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    prune(tiny_model(request.param), folder, config=tiny_config(num_steps=1, sparsity_levels=(0.4,)))
    return folder / "levels" / "sparsity-0.40"


def sizes(model) -> list[tuple[int, int, int]]:
    return [
        (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features, layer.mlp.down_proj.in_features)
        for layer in model.base_model.layers
    ]


def test_auto_map_names_every_class_that_the_family_has(level) -> None:
    auto_map = json.loads((level / "config.json").read_text())["auto_map"]
    expected = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", *HEADS}
    if "gemma3" in AutoConfig.from_pretrained(level).model_type:  # Transformers has no such head for its text model
        expected.remove("AutoModelForTokenClassification")
    assert set(auto_map) == expected
    for reference in auto_map.values():
        file, _, name = reference.partition(".")
        assert file == "modeling_gisp" and getattr(modeling_gisp, name).__name__ == name


def test_auto_model_is_the_model_without_its_head(level, tmp_path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(level)
    base = AutoModel.from_pretrained(level)
    assert type(base).__name__ == f"Gisp{type(whole.model).__name__}"
    expected = whole.model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, expected)
    for number, model in enumerate((base, whole.model)):
        model.save_pretrained(tmp_path / str(number))
        again = AutoModel.from_pretrained(tmp_path / str(number))
        assert torch.equal(again(IDS).last_hidden_state, expected)
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["auto_map"] == whole.config.auto_map


def test_from_config_builds_the_sizes_of_the_level(level) -> None:
    whole = AutoModelForCausalLM.from_pretrained(level)
    config = AutoConfig.from_pretrained(level)
    overrides = config.to_dict()["per_layer_config"]
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        with torch.device("meta"):
            built = auto_class.from_config(config)
        assert sizes(built) == sizes(whole)
        assert config.to_dict()["per_layer_config"] == overrides
    built = AutoModel.from_config(config)
    built.load_state_dict(whole.model.state_dict())
    assert torch.equal(built.eval()(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_sits_on_the_layers_of_the_level(level, name, tmp_path) -> None:
    config = AutoConfig.from_pretrained(level)
    if name not in config.auto_map:
        pytest.skip(f"Transformers has no {name} for {config.model_type}")
    torch.manual_seed(0)
    model = HEADS[name].from_pretrained(level, num_labels=3).eval()
    base = AutoModel.from_pretrained(level)
    assert type(model.model) is type(base) and sizes(model) == sizes(base)
    hidden = base(IDS).last_hidden_state
    logits = model.score(hidden)
    expected = logits[:, -1] if "Sequence" in name else logits  # of the last token, or of each
    torch.testing.assert_close(model(IDS).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    again = HEADS[name].from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.set_attn_implementation("eager")
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"
    attentions = model(IDS, output_attentions=True).attentions
    assert [a.shape[1] for a in attentions] == [layer.num_attention_heads for layer in config.per_layer_config]


def test_a_classifier_trains_on_a_level(tmp_path) -> None:
    prune(tiny_model(), tmp_path, config=tiny_config(num_steps=1, sparsity_levels=(0.4,)))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "levels" / "sparsity-0.40", num_labels=2)
    data = [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][-1] > 33)} for row in tiny_blocks(32)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=30,
        learning_rate=0.01,
        per_device_train_batch_size=32,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]


def test_checkpoints_of_version_0_1_load_through_every_auto_class() -> None:
    folder = GOLDEN / "levels" / "sparsity-0.30"
    whole = AutoModelForCausalLM.from_pretrained(folder)
    expected = whole.model(IDS).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(folder)(IDS).last_hidden_state, expected)
    head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    assert torch.equal(head.model(IDS).last_hidden_state, expected)


REMOTE = """
import json, sys, torch
sys.modules["gisp_hf"] = None  # an import of it fails, as if it were not installed
import transformers
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name in config.auto_map:
        if name != "AutoConfig":
            auto_class = getattr(transformers, name)
            model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
            assert type(model).__module__.startswith("transformers_modules"), type(model)
            print(json.dumps(model.base_model(ids).last_hidden_state.double().flatten().tolist()))
            built = auto_class.from_config(config, trust_remote_code=True)
            built.load_state_dict(model.state_dict())
            assert torch.equal(built.eval()(ids)[0], model(ids)[0]), name
            model.save_pretrained(folder + "-again")
            again = auto_class.from_pretrained(folder + "-again", trust_remote_code=True).eval()
            assert torch.equal(again(ids)[0], model(ids)[0]), name
"""


@pytest.mark.slow
def test_remote_code_alone_is_enough_for_every_auto_class(tmp_path) -> None:
    folders, expected = [], []
    for family in FAMILIES:
        prune(tiny_model(family), tmp_path / family, config=tiny_config(num_steps=1, sparsity_levels=(0.4,)))
        folder = tmp_path / f"level-{family}"
        shutil.move(tmp_path / family / "levels" / "sparsity-0.40", folder)
        count = len(json.loads((folder / "config.json").read_text())["auto_map"]) - 1
        folders.append(str(folder))
        expected += [AutoModel.from_pretrained(folder)(IDS).last_hidden_state] * count
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, json.dumps(IDS.tolist()), *folders]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(expected)
    for line, hidden in zip(lines, expected):
        assert torch.equal(torch.tensor(line).float().view_as(hidden), hidden)


# ---- what raises inside Transformers (docs/transformers.md) ----------------------------------------------------------


def test_configs_of_levels_can_be_compared() -> None:
    one, same = (AutoConfig.from_pretrained(GOLDEN / "levels" / "sparsity-0.30") for _ in range(2))
    other = AutoConfig.from_pretrained(GOLDEN / "levels" / "sparsity-0.15")
    assert one == same and one != other and one != AutoConfig.from_pretrained(GOLDEN / "base")
    assert copy.deepcopy(one) == one
    same.rms_norm_eps = 0.5
    assert one != same


def test_a_plain_config_with_per_layer_sizes_still_cannot() -> None:
    """When this fails, Transformers has mended it: ``PrunedConfigMixin.__eq__`` and a row of the page can go."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    one, same = (LlamaConfig(**sizes, per_layer_config={1: {"num_key_value_heads": 2}}) for _ in range(2))
    with pytest.raises(RuntimeError, match="'num_key_value_heads' is a per-layer attribute"):
        one == same  # noqa: B015
    with pytest.raises(RuntimeError, match="'num_key_value_heads' is a per-layer attribute"):
        find_num_key_value_heads(one)  # so that generate_batch raises
