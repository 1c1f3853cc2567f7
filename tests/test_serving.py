"""Levels in other libraries: quantised by from_pretrained, by torch.export, as ONNX, in ONNX Runtime and ExecuTorch."""

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


@pytest.mark.slow
@_needs("executorch")
@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_executorch_computes_the_same_token_by_token(backend, level, tmp_path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    folder, model, expected = level
    greedy = model.generate(IDS, max_new_tokens=8, do_sample=False)[0].tolist()
    static = AutoModelForCausalLM.from_pretrained(folder).eval()
    static.generation_config.use_cache, static.generation_config.cache_implementation = True, "static"
    exportable = TorchExportableModuleForDecoderOnlyLM(static, batch_size=1, max_cache_len=32, device=static.device)
    program = exportable.export(input_ids=IDS[:, :1], cache_position=torch.arange(1))
    partitioner = [XnnpackPartitioner()] if backend == "xnnpack" else []
    file = tmp_path / "level.pte"
    file.write_bytes(to_edge_transform_and_lower(program, partitioner=partitioner).to_executorch().buffer)

    forward = Runtime.get().load_program(str(file)).load_method("forward")
    ids, logits = IDS[0].tolist(), []
    for position in range(len(greedy) - 1):
        (out,) = forward.execute([torch.tensor([[ids[position]]]), torch.tensor([position])])
        logits.append(out[0, -1].clone())
        if position >= IDS.shape[1] - 1:
            ids.append(int(logits[-1].argmax()))
    assert error_of(torch.stack(logits[: IDS.shape[1]]), expected[0]) < 1e-5
    assert ids == greedy
