"""PEFT's methods take a level as they take its unpruned model: without being told the modules."""

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, DynamicCache

import gisp_hf  # noqa: F401  teaches PEFT the pruned model types
from tests.runs import prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model

IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2, length=8)])


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def level(request, tmp_path_factory):
    """(family, folder of a level whose layers have different numbers of key/value groups)"""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(num_steps=1, sparsity_levels=(0.1,), prune="heads")
    prune(tiny_model(request.param), folder, config=config)
    return request.param, folder / "levels" / "sparsity-0.10"


def adapted_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "base_layer")}


@pytest.mark.parametrize("config_class", [LoraConfig, IA3Config, LoHaConfig, VeraConfig])
def test_a_level_has_the_default_modules_of_its_family(level, config_class) -> None:
    family, folder = level
    found = adapted_modules(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config_class()))
    expected = adapted_modules(get_peft_model(tiny_model(family), config_class()))
    assert found == expected and expected


@pytest.mark.parametrize("config_class", [LoraConfig, IA3Config])
def test_an_adapter_with_default_modules_learns_saves_and_loads(level, config_class, tmp_path) -> None:
    _, folder = level
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config_class(task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


# peft 0.21 hands the cache over by its old name
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_prefix_tuning_gives_each_layer_the_heads_that_it_has(level) -> None:
    """Oracle: the prefix put into a cache by hand, cut to each layer's heads."""
    _, folder = level
    base = AutoModelForCausalLM.from_pretrained(folder)
    counts = [layer.num_key_value_heads for layer in base.config.per_layer_config]
    assert len(set(counts)) > 1
    torch.manual_seed(0)
    adapted = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    found = adapted(input_ids=IDS).logits
    numbers = adapted.prompt_encoder["default"].embedding.weight  # (T, L * 2 * K * h)
    heads, width = max(counts), base.config.head_dim
    states = numbers.view(3, len(counts), 2, heads, width).permute(1, 2, 3, 0, 4)  # (L, 2, K, T, h)
    cache = DynamicCache(config=base.config)
    for number, (count, (keys, values)) in enumerate(zip(counts, states)):
        cache.update(keys[:count].expand(2, -1, -1, -1), values[:count].expand(2, -1, -1, -1), number)
    expected = base(IDS, cache=cache, attention_mask=torch.ones(2, 3 + IDS.shape[1], dtype=torch.long)).logits
    torch.testing.assert_close(found, expected)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    grad = adapted.prompt_encoder["default"].embedding.weight.grad.view(3, len(counts), 2, heads, width)
    for number, count in enumerate(counts):
        assert not grad[:, number, :, count:].any() and grad[:, number, :, :count].any()


def test_prompt_tuning_works_as_it_is(level) -> None:
    _, folder = level
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prompt = adapted.prompt_encoder["default"].embedding.weight.expand(2, -1, -1)
    embedded = torch.cat([prompt, base.get_input_embeddings()(IDS)], dim=1)
    torch.testing.assert_close(adapted(input_ids=IDS).logits, base(inputs_embeds=embedded).logits)
