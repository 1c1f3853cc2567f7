"""The real model and the real text of the demos, as their packages ship them."""

import pytest
import torch

from gisp_hf.models.dtype import fast_dtype
from recipes.demo_data import load_smollm2, load_wikipedia, pack_blocks, split_articles


@pytest.mark.slow
def test_model_and_text_are_the_documented_ones() -> None:
    articles = load_wikipedia()
    assert len(articles) == 89 and 2.3e6 < sum(map(len, articles)) < 2.6e6
    calibration, held_out = split_articles(articles)
    assert not set(calibration) & set(held_out)
    model, tokenizer = load_smollm2()
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        30,
        9,
        3,
    )
    assert model.dtype == fast_dtype()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert tokenizer.decode(tokenizer(held_out[0][:500])["input_ids"]) == held_out[0][:500]
    (block,) = pack_blocks(held_out, tokenizer, length=256, count=1)
    with torch.no_grad():
        loss = model(input_ids=block["input_ids"][None], labels=block["labels"][None]).loss
    assert 2.3 < loss < 4.0  # a model that reads English: perplexity near 23 on all of it, 10-55 on one block
