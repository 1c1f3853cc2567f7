"""Speed, by the tokens that pass through the model."""

import pytest
import torch

from gisp_hf.evaluation import Speed, measure_speed
from tests.tiny import tiny_model


def record_inputs(model) -> list[torch.Tensor]:
    """The input ids of every forward pass from now on."""
    seen: list[torch.Tensor] = []
    model.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"]), with_kwargs=True)
    return seen


FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])


@FAMILIES
def test_speed_reads_the_prompt_once_and_then_single_tokens(family):
    model = tiny_model(family)
    seen = record_inputs(model)
    speeds = measure_speed({"model": model}, prompt_tokens=20, new_tokens=9, batch_size=2, repeats=1)
    assert [tuple(ids.shape) for ids in seen] == 2 * [(2, 20), *9 * [(2, 1)]]  # the warm-up and one repeat
    assert speeds.keys() == {"model"} and isinstance(speeds["model"], Speed)
    assert speeds["model"].prefill > 0 and speeds["model"].decode > 0


@FAMILIES
def test_speed_decodes_the_same_tokens_as_without_a_cache(family):
    model = tiny_model(family)
    seen = record_inputs(model)
    measure_speed({"model": model}, prompt_tokens=20, new_tokens=9, batch_size=2, repeats=1)
    row = torch.cat(seen[:10], dim=1)  # (2, 29)
    with torch.no_grad():
        for t in range(20, 29):
            assert torch.equal(model(input_ids=row[:, :t]).logits[:, -1].argmax(-1), row[:, t])


@FAMILIES
def test_speed_goes_on_past_the_end_token(family):
    model = tiny_model(family)
    seen = record_inputs(model)
    measure_speed({"model": model}, prompt_tokens=20, new_tokens=9, repeats=1)
    ends_at_once = tiny_model(family, eos_token_id=int(seen[2][0, 0]))  # the second token that is written
    calls = record_inputs(ends_at_once)
    measure_speed({"model": ends_at_once}, prompt_tokens=20, new_tokens=9, repeats=1)
    assert len(calls) == 2 * (1 + 9)


def test_speed_takes_turns_and_restores_modes():
    models, turns = {"b": tiny_model(), "a": tiny_model().train()}, []
    for name, model in models.items():
        model.model.register_forward_pre_hook(lambda *call, name=name: turns.append(name))
    speeds = measure_speed(models, prompt_tokens=4, new_tokens=1, repeats=2)
    assert list(speeds) == ["b", "a"]
    assert turns == 3 * ["b", "b", "a", "a"]
    assert [model.training for model in models.values()] == [False, True]


def test_speed_names_the_count_that_it_cannot_use():
    with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
        measure_speed({"model": tiny_model()}, new_tokens=0)


def test_speed_needs_a_model():
    with pytest.raises(ValueError, match="models is empty"):
        measure_speed({})
