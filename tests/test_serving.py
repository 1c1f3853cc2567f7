"""Levels in other libraries: quantised by from_pretrained, by torch.export, as ONNX and in ONNX Runtime."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from tests.cut import save_cut

IDS = torch.arange(3, 19)[None]
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}


def _needs(package: str):
    found = find_spec(package.partition(".")[0]) and find_spec(package)
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def level(tmp_path_factory):
    """A level with two layers that differ in size: (folder, model, logits)."""
    folder = save_cut(tmp_path_factory.mktemp("serving"), "llama", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sizes = [(layer.mlp.up_proj.out_features, layer.self_attn.k_proj.out_features) for layer in model.model.layers]
    assert sizes[0] != sizes[1]
    with torch.no_grad():
        return folder, model, model(IDS).logits


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def _torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZED = {  # name -> (config, largest error of logits, class of the weights)
    "bitsandbytes-8bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.05, "Int8Params"),
    "torchao-int8": (_torchao, 0.05, "Int8Tensor"),
    "quanto-int8": (lambda: QuantoConfig(weights="int8"), 0.05, "WeightQBytesTensor"),
}
PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_needs(PACKAGES[name.partition("-")[0]])) for name in QUANTIZED]
)
def test_quantised_levels_keep_their_logits(name, level) -> None:
    folder, model, expected = level
    config, most, weights = QUANTIZED[name]
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config()).eval()
    assert type(quantised) is type(model)
    assert type(quantised.model.layers[1].mlp.up_proj.weight).__name__ == weights
    with torch.no_grad():
        found = quantised(IDS).logits.float()
    assert 0 < error_of(found, expected) < most  # quantised, but the same model


@pytest.mark.slow
def test_torch_export_computes_the_same_at_any_length(level) -> None:
    _, model, expected = level
    inputs = {"input_ids": IDS, "use_cache": False}
    shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        assert error_of(program(**inputs).logits, expected) < 1e-5
        shorter = IDS[:, :7]
        assert error_of(program(input_ids=shorter, use_cache=False).logits, model(shorter).logits) < 1e-5


@pytest.fixture(scope="module")
def onnx_file(level, tmp_path_factory) -> str:
    _, model, _ = level

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    path = str(tmp_path_factory.mktemp("onnx") / "level.onnx")
    torch.onnx.export(Logits().eval(), (IDS,), path, dynamo=True, input_names=["input_ids"], output_names=["logits"])
    return path


@pytest.mark.slow
@_needs("onnx")
@_needs("onnxscript")
def test_onnx_computes_the_same(level, onnx_file) -> None:
    from onnx.reference import ReferenceEvaluator

    (found,) = ReferenceEvaluator(onnx_file).run(None, {"input_ids": IDS.numpy()})
    assert error_of(torch.from_numpy(found), level[2]) < 1e-4


@pytest.mark.slow
@_needs("onnxscript")
@_needs("onnxruntime")
def test_onnxruntime_computes_the_same(level, onnx_file) -> None:
    from onnxruntime import InferenceSession

    session = InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input_ids": IDS.numpy()})
    assert error_of(torch.from_numpy(found), level[2]) < 1e-4
