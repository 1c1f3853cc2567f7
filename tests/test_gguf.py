"""GGUF files, read back with the package ``gguf``: tensors, sizes of each layer, tokenizer; and all that is refused."""

import math
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tests.cut
from gisp_hf.cli.main import main
from gisp_hf.export import export_gguf
from gisp_hf.export.architectures import choose_architecture
from gisp_hf.export.tensors import grow, interleave, quantisation_notes, rope_factors
from gisp_hf.export.tokenizer import PRE_TOKENIZERS
from gisp_hf.levels.files import read_model_config
from tests.cut import bpe_tokenizer, mixed_lines, save_cut, sentencepiece_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Key -> value, and tensor -> values, of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def export(folder: Path, output: Path, **options) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    export_gguf(folder, output, **options)
    return read(output)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_interleaving_by_its_definition() -> None:
    """Row i of a head becomes row 2i in the first half, 2i+1 - d in the second."""
    heads, d = 3, 6
    rows = torch.arange(heads * d)
    expected = torch.empty_like(rows)
    for head in range(heads):
        for row in range(d):
            to = 2 * row if row < d // 2 else 2 * (row - d // 2) + 1
            expected[head * d + to] = rows[head * d + row]
    assert torch.equal(interleave(rows, heads), expected)
    weight = torch.randn(heads * d, 4)
    assert torch.equal(interleave(weight, heads), weight[expected])
    back = interleave(weight, heads).reshape(heads, d // 2, 2, 4).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(back, weight)


def test_grown_tensors_hold_the_old_one_and_zeros() -> None:
    tensor = torch.randn(6, 5)  # 2 blocks of 3 rows
    grown = grow(tensor, 0, (2, 3), (4, 4))
    assert grown.shape == (16, 5)
    expected = torch.zeros(4, 4, 5)
    for block in range(2):
        for row in range(3):
            expected[block, row] = tensor[3 * block + row]
    assert torch.equal(grown, expected.reshape(16, 5))
    assert torch.equal(grow(tensor.T, 1, (2, 3), (4, 4)), grown.T)
    assert grow(tensor, 0, (2, 3), (2, 3)) is tensor


def test_rope_factors_are_those_of_transformers() -> None:
    config = tiny_model("llama", head_dim=32, rope_parameters=LLAMA3_ROPE).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500.0 ** (torch.arange(0, 32, 2) / 32)
    factors = rope_factors(config)
    assert torch.allclose(plain / factors, scaled, rtol=1e-6) and factors.unique().numel() > 3


@pytest.mark.parametrize("family", ["llama", "llama_mha", "llama_bias", "mistral", "qwen2"])
def test_a_deci_file_holds_the_level(family: str, tmp_path: Path) -> None:
    """Every weight, at its place; q and k with the order of rows of that layer undone."""
    folder = save_cut(tmp_path / "level", family, num_hidden_layers=11)  # from ten on, keys of layers look different
    keys, tensors = export(folder, tmp_path / "level.gguf", file_type="f32")
    weights = load_file(folder / "model.safetensors")
    config = read_model_config(folder)
    heads = [layer.num_attention_heads for layer in config.per_layer_config]
    groups = [layer.num_key_value_heads for layer in config.per_layer_config]
    assert keys["general.architecture"] == "deci" and len(set(groups)) > 1
    assert keys["deci.attention.head_count"] == heads
    assert keys["deci.attention.head_count_kv"] == groups
    assert keys["deci.feed_forward_length"] == [layer.intermediate_size for layer in config.per_layer_config]
    assert keys["deci.block_count"] == 11 and keys["deci.embedding_length"] == 32 and keys["deci.vocab_size"] == 64
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert keys[f"deci.{name}"] == 4
    assert keys["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert keys["deci.rope.freq_base"] == 10_000.0 and keys["general.file_type"] == 0
    assert keys["deci.context_length"] == (16 if family == "mistral" else 64)

    places = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    places |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    places |= {"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    places |= {"mlp.down_proj": "ffn_down"}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outer |= {"lm_head.weight": "output.weight"}
    for name, weight in weights.items():
        if name in outer:
            found = tensors.pop(outer[name])
        else:
            _, _, layer, rest = name.split(".", 3)
            module, _, part = rest.rpartition(".")
            found = tensors.pop(f"blk.{layer}.{places[module]}.{part}")
            if places[module] in ("attn_q", "attn_k"):
                count = (heads if places[module] == "attn_q" else groups)[int(layer)]
                rows = found.reshape(count, 2, 2, *found.shape[1:])  # (heads, head_dim / 2, halves, ...)
                found = rows.swapaxes(1, 2).reshape(found.shape)
        assert np.array_equal(found, weight.numpy()), name
    assert tensors == {}


def test_an_openelm_file_holds_the_level(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "qwen3", tie_word_embeddings=True)
    keys, tensors = export(folder, tmp_path / "level.gguf", file_type="f32")
    weights = load_file(folder / "model.safetensors")
    config = read_model_config(folder)
    assert keys["general.architecture"] == "openelm"
    assert keys["openelm.attention.head_count"] == [layer.num_attention_heads for layer in config.per_layer_config]
    assert keys["openelm.attention.key_length"] == 6
    assert "output.weight" not in tensors
    for layer in range(6):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        qkv = [weights[f"{source}self_attn.{letter}_proj.weight"] for letter in "qkv"]
        assert np.array_equal(tensors[f"{target}attn_qkv.weight"], torch.cat(qkv).numpy())
        for letter in "qk":
            norm = weights[f"{source}self_attn.{letter}_norm.weight"].numpy()
            assert np.array_equal(tensors[f"{target}attn_{letter}_norm.weight"], norm)
    assert len(tensors) == 2 + 6 * 9


def test_float16_matrices_and_float32_vectors(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama", rope_parameters=LLAMA3_ROPE)
    keys, tensors = export(folder, tmp_path / "level.gguf")
    assert keys["general.file_type"] == 1
    for name, values in tensors.items():
        assert values.dtype == (np.float16 if values.ndim > 1 else np.float32), name
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert np.array_equal(tensors["token_embd.weight"], weight.half().numpy())
    assert np.array_equal(tensors["rope_freqs.weight"], rope_factors(read_model_config(folder)).numpy())


def test_shards_and_bfloat16_give_the_same_file(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("level", "shards"):
        export_gguf(tmp_path / name, tmp_path / f"{name}.gguf")
    one, other = read(tmp_path / "level.gguf"), read(tmp_path / "shards.gguf")
    assert all(np.array_equal(one[1][name], other[1][name]) for name in one[1]) and one[1].keys() == other[1].keys()


def test_the_same_level_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama", tokenizer=bpe_tokenizer("gpt-2", mixed_lines(50)))
    for name in ("one", "two"):
        export_gguf(folder, tmp_path / f"{name}.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("qwen3", "qwen3"), ("gemma2", "gemma2"), ("gemma3_text", "gemma3")],
)
def test_padded_files_have_one_size(family: str, architecture: str, tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", family)
    report = export_gguf(folder, tmp_path / "level.gguf", file_type="f32", pad=True)
    keys, tensors = read(report.path)
    assert report.architecture == keys["general.architecture"] == architecture
    assert "neither smaller nor faster" in str(keys["general.description"]) and report.notes[0].startswith("padded")
    assert keys[f"{architecture}.attention.head_count"] == 8
    assert keys[f"{architecture}.attention.head_count_kv"] == 4
    assert keys[f"{architecture}.feed_forward_length"] == 24
    size = 4 if family == "llama" else 6
    for layer in range(6):
        assert tensors[f"blk.{layer}.attn_q.weight"].shape == (8 * size, 32)
        assert tensors[f"blk.{layer}.attn_output.weight"].shape == (32, 8 * size)
        assert tensors[f"blk.{layer}.ffn_down.weight"].shape == (32, 24)
    dense = sum(parameter.numel() for parameter in tiny_model(family).parameters())
    assert sum(values.size for values in tensors.values()) == dense


def test_padded_values_do_not_change_the_level(tmp_path: Path) -> None:
    """The zeros follow the channels and the groups that are there; Gemma's norms are stored with the 1 added."""
    folder = save_cut(tmp_path / "level", "gemma3_text")
    _, tensors = export(folder, tmp_path / "level.gguf", file_type="f32", pad=True)
    weights = load_file(folder / "model.safetensors")
    for layer in range(6):
        down = weights[f"model.layers.{layer}.mlp.down_proj.weight"].numpy()
        padded = tensors[f"blk.{layer}.ffn_down.weight"]
        assert np.array_equal(padded[:, : down.shape[1]], down) and not padded[:, down.shape[1] :].any()
        keys = weights[f"model.layers.{layer}.self_attn.k_proj.weight"].numpy()
        padded = tensors[f"blk.{layer}.attn_k.weight"]
        assert np.array_equal(padded[: len(keys)], keys) and not padded[len(keys) :].any()
        norm = weights[f"model.layers.{layer}.post_feedforward_layernorm.weight"].numpy()
        assert np.allclose(tensors[f"blk.{layer}.post_ffw_norm.weight"], norm + 1)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_byte_level_tokenizers(pre: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(pre, mixed_lines(50))
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer)
    keys, _ = export(folder, tmp_path / "level.gguf")
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == pre
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == [tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))]
    assert len(tokens) == len(tokenizer) + 5 and types[-5:] == [gguf.TokenType.UNUSED] * 5
    assert types[:2] == [gguf.TokenType.CONTROL] * 2 and types[2] == gguf.TokenType.NORMAL
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == gguf.TokenType.USER_DEFINED
    assert keys["tokenizer.ggml.bos_token_id"] == 0 and keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.add_bos_token"] is (pre == "llama-bpe")
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    left, right = keys["tokenizer.ggml.merges"][0].split(" ")
    assert left + right in tokens


def test_every_pre_tokenizer_has_its_test() -> None:
    assert set(PRE_TOKENIZERS.values()) == set(tests.cut.PRE_TOKENIZERS)


@pytest.mark.parametrize("prefix", ["prepend", "metaspace", "none"])
def test_sentencepiece_tokenizers(prefix: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(mixed_lines(50), prefix=prefix)
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer)
    report = export_gguf(folder, tmp_path / "level.gguf")
    assert ("puts a space before every piece of text" in " ".join(report.notes)) is (prefix == "metaspace")
    keys, _ = read(report.path)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.pre"] == "default"
    assert (
        keys["tokenizer.ggml.add_space_prefix"] is (prefix != "none") and keys["tokenizer.ggml.add_bos_token"] is True
    )
    types = keys["tokenizer.ggml.token_type"]
    assert types[0] == gguf.TokenType.UNKNOWN and types[3:259] == [gguf.TokenType.BYTE] * 256
    scores = keys["tokenizer.ggml.scores"]
    tokens = keys["tokenizer.ggml.tokens"]
    merged = [number for number, text in enumerate(tokens) if number > 258 and len(text) > 1 and types[number] == 1]
    assert [scores[number] for number in merged] == sorted((scores[number] for number in merged), reverse=True)


def test_a_level_without_a_tokenizer(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama")
    report = export_gguf(folder, tmp_path / "level.gguf")
    assert "no tokenizer" in " ".join(report.notes)
    assert read(report.path)[0]["tokenizer.ggml.model"] == "none"


def test_nfc_is_noted(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer("qwen2", mixed_lines(50))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer)
    assert "NFC" in " ".join(export_gguf(folder, tmp_path / "level.gguf").notes)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    folder = save_cut(tmp_path / "other", "llama", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="normalises text .Lowercase."):
        export_gguf(folder, tmp_path / "other.gguf")


# ---- notes and refusals ----------------------------------------------------------------------------------------------


def test_notes_on_widths() -> None:
    shapes = {"a.weight": (8, 33), "b.weight": (8, 64), "c.weight": (8, 512), "norm.weight": (33,)}
    odd, coarse = quantisation_notes(shapes)
    assert odd.startswith("1 of 3 matrices have a width that is no multiple of 32 (a 33)") and "channel_multiple" in odd
    assert coarse.startswith("1 of 3 matrices have a width that is no multiple of 256 (b 64)")
    assert quantisation_notes({"c.weight": (8, 512)}) == []


def test_a_sliding_window_is_noted(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "mistral")
    assert "looks back 16 tokens" in " ".join(export_gguf(folder, tmp_path / "level.gguf").notes)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3", "openelm.* always uses the embeddings as the output matrix.*--pad"),
        ("gemma2", "gemma2 reads one size for all layers.*norms after attention.*--pad"),
        ("gemma3_text", "gemma3 reads one size for all layers.*--pad"),
    ],
)
def test_models_that_llama_cpp_cannot_hold(family: str, reason: str, tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", family)
    with pytest.raises(ValueError, match=f"llama.cpp cannot hold this {family} model: .*{reason}"):
        export_gguf(folder, tmp_path / "level.gguf")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_settings_that_would_be_ignored() -> None:
    def refused(**changes) -> str:
        with pytest.raises(ValueError) as error:
            choose_architecture(tiny_model("llama", **changes).config, pad=False)
        return str(error.value)

    assert "the activation is gelu" in refused(hidden_act="gelu")
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    assert "rotary scaling 'yarn'" in refused(rope_parameters=yarn)
    config = tiny_model("gemma2", query_pre_attn_scalar=8).config
    with pytest.raises(ValueError, match="query_pre_attn_scalar is 8, and llama.cpp's gemma2 uses 6"):
        choose_architecture(config, pad=True)


def test_tokenizers_that_llama_cpp_lacks(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="a tokenizer of type WordLevel cannot be exported"):
        export_gguf(folder, tmp_path / "level.gguf")
    tokenizer = bpe_tokenizer("llama-bpe", mixed_lines(50))
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer has ids up to .* and the model has 69 embeddings"):
        export_gguf(folder, tmp_path / "level.gguf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    folder = save_cut(tmp_path / "other", "llama", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the pre-tokenizer .* is none that can be exported"):
        export_gguf(folder, tmp_path / "other.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_tensors_that_have_no_place(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.gate.scale": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="deci has no place for model.layers.0.gate.scale"):
        export_gguf(folder, tmp_path / "level.gguf")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks model.layers.1.mlp.up_proj.weight"):
        export_gguf(folder, tmp_path / "level.gguf")


def test_tensors_that_do_not_fit_the_config(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**weights, name: weights[name][:, :-1].contiguous()}, folder / "model.safetensors")
    entries = weights[name].shape[1]
    with pytest.raises(ValueError, match=f"{name}: {entries - 1} entries along dimension 1, .* config says {entries}"):
        export_gguf(folder, tmp_path / "level.gguf")
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is of type I8: export the unquantised level"):
        export_gguf(folder, tmp_path / "level.gguf")


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.5.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="blk.5.ffn_up.weight has weights beyond the range of f16; use --type f32"):
        export_gguf(folder, tmp_path / "level.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["level"]
    assert math.isclose(export(folder, tmp_path / "level.gguf", file_type="f32")[1]["blk.5.ffn_up.weight"][0, 0], 1e6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_cut(tmp_path / "run" / "sparsity-0.20", "llama", tokenizer=bpe_tokenizer("qwen2", mixed_lines(50)))
    output = tmp_path / "level.gguf"
    assert main(["export", str(folder), "--gguf", str(output), "--type", "f32"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}: {output.stat().st_size / 1e6:,.1f} MB, llama.cpp's deci, f32\n"
    assert "note: " in err and "channel_multiple=32" in err
    assert read(output)[0]["general.name"] == "sparsity-0.20"
    assert main(["export", str(folder), "--gguf", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--gguf", str(tmp_path / "other.gguf")]) == 2
    assert "it holds the levels sparsity-0.20" in capsys.readouterr().err
    assert main(["export", str(folder), "--gguf", str(tmp_path / "nowhere" / "other.gguf")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_package_is_named_when_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    folder = save_cut(tmp_path / "level", "llama")
    assert main(["export", str(folder), "--gguf", str(tmp_path / "level.gguf")]) == 2
    assert "pip install 'gisp_hf[export]'" in capsys.readouterr().err
