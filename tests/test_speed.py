"""Speed, by the tokens that pass through the model."""

import pytest
import torch

from gisp_hf.evaluation import Speed, measure_speed
from tests.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_speed_decodes_greedily_past_the_end_token(family):
    model, seen = tiny_model(family), []
    model.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"]), with_kwargs=True)
    speeds = measure_speed({"model": model}, prompt_tokens=20, new_tokens=9, batch_size=2, repeats=1)
    assert speeds.keys() == {"model"}
    assert isinstance(speeds["model"], Speed)
    assert speeds["model"].prefill > 0
    assert speeds["model"].decode > 0

    shapes = [tuple(ids.shape) for ids in seen]
    assert shapes == 2 * [(2, 20), *9 * [(2, 1)]]  # the warm-up and one repeat
    row = torch.cat(seen[:10], dim=1)  # (2, 29)
    with torch.no_grad():
        for t in range(20, 29):  # the same tokens as without any cache
            assert torch.equal(model(input_ids=row[:, :t]).logits[:, -1].argmax(-1), row[:, t])

    eos = tiny_model(family, eos_token_id=int(row[0, 21]))  # the end token comes up at once: nothing is cut short
    calls = []
    eos.model.register_forward_pre_hook(lambda *call: calls.append(1))
    measure_speed({"model": eos}, prompt_tokens=20, new_tokens=9, repeats=1)
    assert len(calls) == 2 * (1 + 9)


def test_speed_takes_turns_and_restores_modes():
    models, turns = {"b": tiny_model(), "a": tiny_model().train()}, []
    for name, model in models.items():
        model.model.register_forward_pre_hook(lambda *call, name=name: turns.append(name))
    speeds = measure_speed(models, prompt_tokens=4, new_tokens=1, repeats=2)
    assert list(speeds) == ["b", "a"]
    assert turns == 3 * ["b", "b", "a", "a"]
    assert [model.training for model in models.values()] == [False, True]


def test_speed_names_what_it_cannot_use():
    with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
        measure_speed({"model": tiny_model()}, new_tokens=0)
    with pytest.raises(ValueError, match="models is empty"):
        measure_speed({})
