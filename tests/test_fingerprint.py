import pytest
import torch

from gisp_hf.models import fingerprint as module
from gisp_hf.models.fingerprint import fingerprint, tensor_checksum
from tests.tiny import tiny_model


def test_same_weights_in_another_dtype_agree() -> None:
    torch.manual_seed(0)
    weights = torch.randn(40, 30).bfloat16()
    assert tensor_checksum(weights) == tensor_checksum(weights.float()) == tensor_checksum(weights.double())


def test_shards_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    weights = torch.randn(41, 30)
    parts = [
        tensor_checksum(weights[:10]),
        tensor_checksum(weights[10:11], first_row=10),
        tensor_checksum(weights[11:], first_row=11),
    ]
    assert tuple(sum(column) % 2**64 for column in zip(*parts)) == tensor_checksum(weights)


def test_chunks_do_not_matter(monkeypatch) -> None:
    weights = torch.randn(100, 7)
    whole = tensor_checksum(weights)
    monkeypatch.setattr(module, "CHUNK", 64)
    assert tensor_checksum(weights) == whole


@pytest.mark.parametrize("change", ["value", "rows", "columns", "bias", "seed"])
def test_any_change_is_seen(change) -> None:
    model, other = tiny_model("qwen2"), tiny_model("qwen2", seed=int(change == "seed"))
    assert fingerprint(model.named_parameters()) == fingerprint(tiny_model("qwen2").named_parameters())
    with torch.no_grad():
        weight = other.model.layers[2].mlp.up_proj.weight
        if change == "value":
            weight[3, 4] += 0.01
        elif change == "rows":
            weight.copy_(weight.flip(0))
        elif change == "columns":
            weight.copy_(weight.flip(1))
        elif change == "bias":
            other.model.layers[0].self_attn.q_proj.bias.copy_(other.model.layers[0].self_attn.q_proj.bias.flip(0))
    assert fingerprint(model.named_parameters()) != fingerprint(other.named_parameters())
