"""A pruned checkpoint is a normal checkpoint: everything that one does with a model works on a level."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import gisp_hf  # noqa: F401  teaches AutoModelForCausalLM the pruned classes
from gisp_hf.levels.save import save_level
from tests.runs import prune, tiny_config
from tests.tiny import FAMILIES, tiny_blocks, tiny_model, tiny_tokenizer

CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def level(request, tmp_path_factory):
    """(the pruned model in memory, the folder of its level)"""
    family, tied = request.param
    folder = tmp_path_factory.mktemp(family)
    model = tiny_model(family, tie_word_embeddings=tied)
    prune(model, folder, config=tiny_config(num_steps=2, sparsity_levels=(0.4,)))
    return model, folder / "levels" / "sparsity-0.40"


def inputs() -> torch.Tensor:
    return torch.stack([block["input_ids"] for block in tiny_blocks(2, length=12)])


@pytest.mark.slow
def test_folder_holds_all_that_loading_needs_and_no_pickle(level) -> None:
    _, folder = level
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling_gisp.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "trajectory.json",
        "trajectory.safetensors",
    }
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_gisp.Gisp")
    assert config["model_type"].startswith("gisp_") and len(config["per_layer_config"]) >= 1
    assert "quantization_config" not in config


def test_the_index_names_the_tensors_of_the_single_file_and_no_other_file(level) -> None:
    """vLLM reads the safetensors files that an index names, and every one of a folder without an index."""
    _, folder = level
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(tensors, "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_loads_without_the_index_as_older_levels_do(level, tmp_path) -> None:
    model, folder = level
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "model.safetensors.index.json").unlink()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(old)(inputs()).logits, model(inputs()).logits)


def test_saved_equals_loaded(level, tmp_path) -> None:
    model, folder = level
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model) and loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert torch.equal(loaded(inputs()).logits, model(inputs()).logits)
    if loaded.config.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)
    assert (tmp_path / "again" / "modeling_gisp.py").read_text() == (folder / "modeling_gisp.py").read_text()
    model.save_pretrained(tmp_path / "memory")  # the model that the Trainer leaves behind saves like any other
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(memory(inputs()).logits, model(inputs()).logits)
    assert AutoTokenizer.from_pretrained(folder)("w5 w9")["input_ids"] == [5, 9]


@pytest.mark.slow
def test_generation_with_caches_batch_and_left_padding(level) -> None:
    _, folder = level
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None

    def generate(ids, **options):
        mask = options.pop("attention_mask", torch.ones_like(ids))
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)

    ids = inputs()
    expected = ids
    for _ in range(8):  # the definition: no cache at all
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(ids), expected)
    assert torch.equal(generate(ids, cache_implementation="static"), expected)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    if model.config.model_type != "gisp_mistral":  # a sliding window of 16 counts the padding: another answer is right
        assert torch.equal(generate(padded, attention_mask=mask)[:, 3:], expected)
    else:
        short = ids[:, :4]
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), short], dim=1)
        mask = (torch.arange(7) >= 3).long().expand(2, -1)
        assert torch.equal(generate(padded, attention_mask=mask)[:, 3:], generate(short))


def test_attention_implementation_can_be_changed_after_loading(level) -> None:
    model, folder = level
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = model(inputs()).logits
    eager = loaded(inputs()).logits
    torch.testing.assert_close(eager, expected, rtol=1e-4, atol=1e-4)
    attentions = loaded(inputs(), output_attentions=True).attentions
    assert [a.shape[1] for a in attentions] == [c.num_attention_heads for c in loaded.config.per_layer_config]
    if loaded.config.model_type == "gisp_gemma2":  # soft-capped scores: eager is all it has on a CPU
        return
    loaded.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded(inputs()).logits, expected)
    assert loaded.model.layers[0].self_attn.config._attn_implementation == "sdpa"


REMOTE = """
import json, sys, torch
sys.modules["gisp_hf"] = None  # an import of it fails, as if it were not installed
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    print(json.dumps(model(ids).logits.double().flatten().tolist()))
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits)
"""


@pytest.mark.slow
def test_remote_code_loads_without_the_package(tmp_path) -> None:
    folders, expected = [], []
    for family, tied in CASES:
        model = tiny_model(family, tie_word_embeddings=tied)
        run = tmp_path / f"{family}-{tied}"
        prune(model, run, config=tiny_config(num_steps=1, sparsity_levels=(0.4,)))
        folder = tmp_path / f"level-{family}-{tied}"
        shutil.move(run / "levels" / "sparsity-0.40", folder)
        folders.append(str(folder))
        expected.append(model(inputs()).logits)
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, json.dumps(inputs().tolist()), *folders]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(CASES)
    for case, line, logits in zip(CASES, lines, expected):
        assert torch.equal(torch.tensor(line).float().view_as(logits), logits), case


@pytest.fixture(scope="module")
def llama_level(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    prune(tiny_model(), folder, config=tiny_config(num_steps=1, sparsity_levels=(0.4,)))
    return folder / "levels" / "sparsity-0.40"


def train(model, tmp_path, **options) -> tuple[float, float]:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        learning_rate=0.02,
        per_device_train_batch_size=16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=args, train_dataset=tiny_blocks(16))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


def test_trainer_trains_a_level(llama_level, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_level)
    first, last = train(model, tmp_path, activation_checkpointing=True)
    assert last < 0.9 * first


def test_lora_trains_a_level_and_merges(llama_level, tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(llama_level)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    first, last = train(adapted, tmp_path)
    assert last < 0.95 * first
    adapted.eval()
    expected = adapted(input_ids=inputs()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_level), tmp_path / "adapter").eval()
    torch.testing.assert_close(fresh(input_ids=inputs()).logits, expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(inputs()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_forward_equals_eager(llama_level) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_level)
    with torch.no_grad():
        expected = model(inputs()).logits
        found = torch.compile(model)(inputs()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_level_can_be_pruned_further(llama_level, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_level)
    before = sum(parameter.numel() for parameter in model.model.layers.parameters())
    prune(model, tmp_path, config=tiny_config(num_steps=2, sparsity_levels=(0.2,)))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / "sparsity-0.20")
    after = sum(parameter.numel() for parameter in again.model.layers.parameters())
    assert 0.7 * before < after <= 0.8 * before
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)


def test_a_failed_save_leaves_nothing_behind(tmp_path) -> None:
    model = tiny_model()
    pruner = prune(tiny_model(), tmp_path)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_level(model, tmp_path / "level", trajectory=pruner.trajectory, sliced=False, tokenizer=Broken())  # type: ignore
    assert not (tmp_path / "level").exists() and not (tmp_path / "level.tmp").exists()
    save_level(model, tmp_path / "level", trajectory=pruner.trajectory, sliced=False, tokenizer=tiny_tokenizer())
    with pytest.raises(FileExistsError, match="exists already"):
        save_level(model, tmp_path / "level", trajectory=pruner.trajectory, sliced=False)


def test_configs_check_themselves() -> None:
    from gisp_hf.models.modeling_gisp import GispLlamaConfig

    good = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
    }
    GispLlamaConfig(**good, per_layer_config={0: {"num_attention_heads": 6, "num_key_value_heads": 3}})
    with pytest.raises(Exception, match=r"layer 0: num_attention_heads \(5\) must be divisible by num_key_value_heads"):
        GispLlamaConfig(**good, per_layer_config={0: {"num_attention_heads": 5, "num_key_value_heads": 3}})
