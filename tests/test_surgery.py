import pytest
import torch

from gisp_hf.models import discover
from gisp_hf.models.surgery import as_pruned_model, pruned_shell, slice_structures, zero_structures
from tests.tiny import FAMILIES, tiny_blocks, tiny_model


def random_keeps(layout, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for block in layout.blocks:
        count = int(torch.randint(1, block.size + 1, (1,), generator=generator))
        keeps.append(torch.randperm(block.size, generator=generator)[:count].sort().values)
    return keeps


def keeps_of(layout, changed: dict[int, list[int]]) -> list[torch.Tensor]:
    """All structures, but of some blocks these only."""
    return [torch.tensor(changed.get(number, range(block.size))) for number, block in enumerate(layout.blocks)]


def gone(block, keep) -> torch.Tensor:
    mask = torch.ones(block.size, dtype=torch.bool)
    mask[keep] = False
    return mask.nonzero().squeeze(1)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_mask_equals_slice(family) -> None:
    masked, sliced = tiny_model(family), tiny_model(family)
    layout = discover(masked)
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(3)])
    for seed in range(3):
        masked, sliced = tiny_model(family), tiny_model(family)
        keeps = random_keeps(layout, seed)
        for block, keep in zip(layout.blocks, keeps):
            zero_structures(masked, block, gone(block, keep))
        slice_structures(sliced, layout, keeps)
        expected, found = masked(ids).logits, sliced(ids).logits
        assert (expected - tiny_model(family)(ids).logits).abs().max() > 1e-2  # it makes a difference at all
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        removed = sum(len(gone(block, keep)) * block.cost for block, keep in zip(layout.blocks, keeps))
        assert sum(p.numel() for p in sliced.model.layers.parameters()) == layout.total - removed
        zeroed = sum(int((p == 0).sum()) for p in masked.model.layers.parameters())
        assert zeroed == removed


def test_parameter_objects_stay_and_attributes_are_right(family) -> None:
    model = tiny_model(family)
    layout = discover(model)
    before = dict(model.named_parameters())
    keeps = random_keeps(layout)
    slice_structures(model, layout, keeps)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(parameter.is_contiguous() for parameter in after.values())
    for layer, (attention, mlp) in enumerate(zip(keeps[::2], keeps[1::2])):
        module = model.model.layers[layer]
        head_dim = module.self_attn.head_dim
        queries = module.self_attn.num_key_value_groups
        assert queries == model.config.num_attention_heads // model.config.num_key_value_heads
        assert module.self_attn.q_proj.out_features == len(attention) * queries * head_dim
        assert module.self_attn.k_proj.out_features == len(attention) * head_dim
        assert module.self_attn.o_proj.in_features == len(attention) * queries * head_dim
        assert module.mlp.up_proj.out_features == module.mlp.down_proj.in_features == len(mlp)
        assert module.mlp.intermediate_size == len(mlp)
    found = discover(model)
    assert [block.size for block in found.blocks] == [len(keep) for keep in keeps]


def test_slicing_twice_equals_slicing_once() -> None:
    once, twice = tiny_model("qwen2"), tiny_model("qwen2")
    layout = discover(once)
    slice_structures(once, layout, keeps_of(layout, {3: [2, 7, 20]}))
    slice_structures(twice, layout, keeps_of(layout, {3: [0, 2, 7, 9, 20, 21]}))
    slice_structures(twice, discover(twice), keeps_of(discover(twice), {3: [1, 2, 4]}))
    for a, b in zip(once.parameters(), twice.parameters()):
        assert torch.equal(a, b)


def test_gradients_flow_after_slicing() -> None:
    model = tiny_model("llama")
    ids = tiny_blocks(1)[0]["input_ids"][None]
    model(input_ids=ids, labels=ids).loss.backward()
    layout = discover(model)
    block = layout.blocks[2]
    slice_structures(model, layout, keeps_of(layout, {2: [1, 3]}))
    assert all(model.get_parameter(member.parameter).grad is None for member in block.members)
    model(input_ids=ids, labels=ids).loss.backward()
    for member in block.members:
        parameter = model.get_parameter(member.parameter)
        assert parameter.grad.shape == parameter.shape and parameter.grad.abs().sum() > 0


def test_shell_has_the_shapes_of_the_sliced_model(family) -> None:
    model = tiny_model(family)
    layout = discover(model)
    keeps = random_keeps(layout)
    shell = pruned_shell(model, layout, [len(keep) for keep in keeps])
    assert all(parameter.is_meta for parameter in shell.parameters())
    slice_structures(model, layout, keeps)
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (shell, model)]
    assert shapes[0] == shapes[1]
    assert type(model.config).__name__ == FAMILIES[family][0].__name__  # the shell took a copy


def test_pruned_class_describes_the_model(family) -> None:
    model = tiny_model(family)
    layout = discover(model)
    keeps = random_keeps(layout)
    slice_structures(model, layout, keeps)
    ids = tiny_blocks(1)[0]["input_ids"][None]
    before = model(ids).logits
    as_pruned_model(model, layout, [len(keep) for keep in keeps])
    assert model.config.model_type == f"gisp_{layout.architecture}"
    assert torch.equal(model(ids).logits, before)
    for layer, (attention, mlp) in enumerate(zip(keeps[::2], keeps[1::2])):
        sizes = model.config.per_layer_config[layer]
        assert (sizes.num_key_value_heads, sizes.intermediate_size) == (len(attention), len(mlp))
