"""Restoration in memory, against the definition by whole matrices."""

import copy

import pytest
import torch

from gisp_hf import RestoreConfig, restore
from gisp_hf.models import discover
from gisp_hf.models.surgery import as_pruned_model, slice_structures
from gisp_hf.recovery.fit import restored_weights
from gisp_hf.recovery.layers import Layers, ModelWeights, shell_of
from gisp_hf.recovery.record import Restoration
from tests import toy_family
from tests.restoring import ids_of, pair, pruned_copy, restore_by_whole_matrices
from tests.tiny import FAMILIES, tiny_blocks, tiny_model

CPU = torch.device("cpu")


def is_refitted(name: str) -> bool:
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def layers_of(model, dtype: torch.dtype = torch.float32) -> Layers:
    return Layers(shell_of(model), ModelWeights(model), device=CPU, dtype=dtype)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3"])
def test_equals_the_definition_by_whole_matrices(family, blend) -> None:
    base, level = pair(family)
    expected = copy.deepcopy(level)
    restore_by_whole_matrices(expected, base, ids_of(), blend=blend, ridge=0.01)
    restore(level, base, tiny_blocks(64), RestoreConfig(blend=blend, ridge=0.01, batch_size=24), progress=False)
    for (name, found), wanted in zip(level.named_parameters(), expected.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_stays_bit_identical_and_errors_fall(family) -> None:
    base, level = pair(family)
    before = copy.deepcopy(level)
    record = restore(level, base, tiny_blocks(64), RestoreConfig(blend=0.5), progress=False)
    for (name, found), old in zip(level.named_parameters(), before.parameters()):
        assert torch.equal(found, old) != is_refitted(name), name
    assert set(record.changed) == {name for name, _ in level.named_parameters() if is_refitted(name)}
    assert all(error.after < error.before for error in record.errors)
    ids = ids_of()
    with torch.no_grad():
        wanted, old, found = (model(ids).logits for model in (base, before, level))
    assert (found - wanted).norm() < 0.9 * (old - wanted).norm()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_one_at_a_time_equal_the_model(family, padded) -> None:
    model = pruned_copy(tiny_model(family))
    batch = {"input_ids": ids_of(3, length=40)}  # beyond the sliding window of 16
    if padded:
        batch["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [25], [7]])).long()
    with torch.no_grad():
        expected = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    layers = layers_of(model)
    counts = batch.get("attention_mask", torch.ones(3, 40)).bool()
    (hidden,) = layers.embed([batch])
    for number in range(len(layers)):
        torch.testing.assert_close(hidden[counts], expected[number][counts], rtol=1e-5, atol=1e-5)
        with layers.loaded(number):
            hidden = layers.run(number, hidden, batch)
    torch.testing.assert_close(model.model.norm(hidden)[counts], expected[-1][counts], rtol=1e-5, atol=1e-5)
    inside = [p for layer in layers.layers for p in layer.parameters()]
    assert all(p.is_meta for p in [*inside, *layers.shell.get_input_embeddings().parameters()])  # given back


@pytest.mark.parametrize("blend", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpruned_level_has_no_error_and_stays(family, blend) -> None:
    base = tiny_model(family)
    level = copy.deepcopy(base)
    record = restore(level, base, tiny_blocks(16), RestoreConfig(blend=blend), progress=False)
    assert max(error.before for error in record.errors) < 1e-5
    for found, old in zip(level.parameters(), base.parameters()):
        torch.testing.assert_close(found, old, rtol=1e-4, atol=1e-5)


def test_a_family_with_a_projection_of_its_own_is_restored() -> None:
    toy_family.register()
    try:
        base = toy_family.toy_model()
        level = pruned_copy(base)
        ids = ids_of()
        with torch.no_grad():
            wanted, old = base(ids).logits, level(ids).logits
        for blend in (0.0, 0.5):
            found = copy.deepcopy(level)
            record = restore(found, base, tiny_blocks(64), RestoreConfig(blend=blend), progress=False)
            assert [e.projection for e in record.errors[:3]] == ["self_attn.o_proj", "mlp.down_proj", "widen"]
            with torch.no_grad():
                assert (found(ids).logits - wanted).norm() < 0.9 * (old - wanted).norm()
    finally:
        from gisp_hf.models import KINDS
        from gisp_hf.models.families import FAMILIES as ROWS

        del KINDS["bottleneck"]
        ROWS.pop()


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_removed_inputs_that_kept_ones_repeat_are_restored_exactly(blend) -> None:
    base = tiny_model("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):  # groups 2 and 3 repeat 0 and 1
                half = len(projection.weight) // 2
                projection.weight[half:] = projection.weight[:half]
            for projection, factor in ((mlp.gate_proj, 1.0), (mlp.up_proj, -2.0)):  # channels: -2 times another
                projection.weight[12:] = factor * projection.weight[:12]
    level = copy.deepcopy(base)
    layout = discover(level)
    kept = [torch.arange(block.size // 2) for block in layout.blocks]
    slice_structures(level, layout, kept)
    as_pruned_model(level, layout, [len(keep) for keep in kept])
    ids = ids_of()
    with torch.no_grad():
        wanted = base(ids).logits
        assert (level(ids).logits - wanted).norm() > 0.3 * wanted.norm()
    restore(level, base, tiny_blocks(64), RestoreConfig(blend=blend, ridge=0.0), progress=False)
    with torch.no_grad():
        found, states = (model(ids, output_hidden_states=True).hidden_states for model in (level, base))
        assert (found[1] - states[1]).norm() < 1e-5 * states[1].norm()  # behind the first layer
        assert (level(ids).logits - wanted).norm() < 5e-5 * wanted.norm()  # behind six, in float32


def test_a_padded_batch_equals_its_sequences_alone() -> None:
    base, level = pair()
    other = copy.deepcopy(level)
    blocks = tiny_blocks(30)
    examples = [{"input_ids": b["input_ids"][: 16 - n % 7]} for n, b in enumerate(blocks)]
    one = restore(level, base, examples, RestoreConfig(batch_size=30, blend=0.5), progress=False)
    two = restore(other, base, examples, RestoreConfig(batch_size=1, blend=0.5), progress=False)
    assert one.tokens == two.tokens == sum(len(example["input_ids"]) for example in examples)
    for found, wanted in zip(level.parameters(), other.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_answers_alone_count_if_asked() -> None:
    base, level = pair()
    expected = copy.deepcopy(level)
    examples, counted = [], torch.zeros(64, 16, dtype=torch.bool)
    for row, block in enumerate(tiny_blocks(64)):
        first = 4 + row % 6  # the answer's first token
        labels = block["input_ids"].clone()
        labels[:first] = -100
        examples.append({"input_ids": block["input_ids"], "labels": labels})
        counted[row, first - 1 :] = True  # and the one that it is predicted from
    config = RestoreConfig(blend=0.5, ridge=0.01, batch_size=24, positions="answers")
    record = restore(level, base, examples, config, progress=False)
    assert record.tokens == int(counted.sum())
    restore_by_whole_matrices(expected, base, ids_of(), blend=0.5, ridge=0.01, counted=counted)
    for (name, found), wanted in zip(level.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(found, wanted[1], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_answers_are_needed_where_they_alone_count() -> None:
    base, level = pair()
    config = RestoreConfig(positions="answers")
    with pytest.raises(ValueError, match="needs calibration data with labels"):
        restore(level, base, [{"input_ids": ids_of(4)}], config, progress=False)
    without = [{"input_ids": ids_of(4), "labels": torch.full((4, 16), -100)}]
    with pytest.raises(ValueError, match="all labels are -100"):
        restore(level, base, without, config, progress=False)


def test_a_bfloat16_level_is_rounded_once() -> None:
    base, level = pair(dtype=torch.bfloat16)
    batches = [{"input_ids": ids_of(32)}]
    settings = {"config": RestoreConfig(), "blend": 0.5, "progress": False}
    low = next(iter(restored_weights(layers_of(level), layers_of(base), batches, **settings)))
    high = next(iter(restored_weights(layers_of(level.float()), layers_of(base.float()), batches, **settings)))
    assert (low.weight.dtype, high.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(low.weight, high.weight.bfloat16())


def test_a_bfloat16_model_keeps_its_dtype() -> None:
    base, level = pair(dtype=torch.bfloat16)
    record = restore(level, base, tiny_blocks(16), progress=False)
    assert {p.dtype for p in level.parameters()} == {torch.bfloat16}
    assert sum(e.after for e in record.errors) < sum(e.before for e in record.errors)


def test_files_of_hidden_states_change_nothing() -> None:
    base, level = pair("gemma2")
    other = copy.deepcopy(level)
    restore(level, base, tiny_blocks(24), RestoreConfig(batch_size=8), progress=False)
    restore(other, base, tiny_blocks(24), RestoreConfig(batch_size=8, spill=True), progress=False)
    assert all(torch.equal(one, two) for one, two in zip(level.parameters(), other.parameters()))


def test_the_base_in_files_equals_the_base_in_memory(tmp_path) -> None:
    base, level = pair("gemma3_text")
    other = copy.deepcopy(level)
    base.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    one = restore(level, base, tiny_blocks(24), progress=False)
    two = restore(other, tmp_path, tiny_blocks(24), progress=False)
    assert all(torch.equal(one, two) for one, two in zip(level.parameters(), other.parameters()))
    assert one == two


def test_of_several_ridges_each_projection_takes_the_best_on_held_out_sequences() -> None:
    base, level = pair()
    candidates = (1e-4, 1e-2, 1.0)
    record = restore(level, base, tiny_blocks(40), RestoreConfig(ridge=candidates, batch_size=7), progress=False)
    assert {error.ridge for error in record.errors} <= set(candidates)
    assert record.tokens == 40 * 16  # those held out count in the end
    alone = copy.deepcopy(pair()[1])
    ridge = record.errors[0].ridge
    first = next(iter(restored_weights(
        layers_of(alone), layers_of(base), [{"input_ids": ids_of(40)}],
        config=RestoreConfig(ridge=ridge), blend=record.blend, progress=False,
    )))  # fmt: skip
    torch.testing.assert_close(level.get_parameter(first.parameter), first.weight, rtol=1e-3, atol=1e-4)


def test_fewer_tokens_than_inputs_give_a_finite_result(caplog) -> None:
    base, level = pair()
    record = restore(level, base, tiny_blocks(1, 4), progress=False)
    assert all(p.isfinite().all() for p in level.parameters()) and record.tokens == 4
    assert "ten tokens an input are better" in caplog.text


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_inputs_that_are_all_zero_leave_the_weight(ridge) -> None:
    base = tiny_model("llama")
    with torch.no_grad():
        base.model.layers[2].self_attn.v_proj.weight.zero_()
        base.model.layers[3].mlp.up_proj.weight.zero_()
    level = pruned_copy(base)
    before = copy.deepcopy(level)
    record = restore(level, base, tiny_blocks(16), RestoreConfig(ridge=ridge, blend=0.0), progress=False)
    for name in ("model.layers.2.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        assert torch.equal(level.get_parameter(name), before.get_parameter(name))
    assert all(p.isfinite().all() for p in level.parameters())
    assert (record.errors[4].before, record.errors[4].after) == (0.0, 0.0)


def test_nan_is_an_error_and_the_level_stays() -> None:
    base, level = pair()
    with torch.no_grad():
        base.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    before = copy.deepcopy(level)
    with pytest.raises(FloatingPointError, match=r"model.layers.3.mlp.down_proj.weight .* is not finite"):
        restore(level, base, tiny_blocks(16), progress=False)
    for one, two in zip(level.parameters(), before.parameters()):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_another_model_is_refused() -> None:
    _, level = pair()
    for base in (tiny_model("qwen2"), tiny_model(num_hidden_layers=5), tiny_model(hidden_size=16)):
        with pytest.raises(ValueError, match="cannot come from this base"):
            restore(level, base, tiny_blocks(16), progress=False)
    small = pruned_copy(tiny_model(), share=0.3)
    with pytest.raises(ValueError, match="cannot come from this base"):
        restore(level, small, tiny_blocks(16), progress=False)


def test_no_tokens_are_refused() -> None:
    base, level = pair()
    with pytest.raises(ValueError, match="hold no sequence of at most 8 tokens"):
        restore(level, base, tiny_blocks(4, 16), RestoreConfig(tokens=8), progress=False)
    with pytest.raises(ValueError, match="hold no sequence"):
        restore(level, base, [], progress=False)


def test_tokens_are_a_limit() -> None:
    base, level = pair()
    record = restore(level, base, tiny_blocks(40), RestoreConfig(tokens=16 * 21, batch_size=8), progress=False)
    assert record.tokens == 16 * 21


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blend": 1.5}, r"blend must lie in \[0, 1\], got 1.5"),
        ({"ridge": -1.0}, "ridge must be one or more numbers of at least 0"),
        ({"ridge": ()}, "ridge must be one or more"),
        ({"ridge": (float("nan"),)}, "ridge must be one or more"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"positions": "prompt"}, "positions must be all or answers"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_impossible_settings_are_refused(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        RestoreConfig(**values)


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    base, level = pair()
    record = restore(level, base, tiny_blocks(16), progress=False)
    record.save(tmp_path)
    assert Restoration.load(tmp_path) == record
    with pytest.raises(FileNotFoundError):
        Restoration.load(tmp_path / "elsewhere")
    path = tmp_path / "restoration.json"
    for old, new in (('"tokens": 256', '"tokens": -1'), ('"blend": ', '"blend": 7'), ('"format": 1', '"format": 2')):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="restore the level again"):
            Restoration.load(tmp_path)
        path.write_text(text)


def test_the_middle_ridge_is_taken_where_no_sequence_can_be_held_out() -> None:
    base, level = pair("llama")
    record = restore(level, base, tiny_blocks(9, 32), RestoreConfig(ridge=(1.0, 0.01, 0.1)), progress=False)
    assert {error.ridge for error in record.errors} == {0.1}
