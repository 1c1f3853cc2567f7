"""Norms of their own for the widths of an elastic model: put in, trained, saved; every matrix stays shared."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from gisp_hf.cli.main import main
from gisp_hf.data import load_calibration
from gisp_hf.levels.elastic import save_elastic, set_norms
from gisp_hf.losses import margin_loss
from gisp_hf.recovery.elastic_file import write_elastic
from gisp_hf.recovery.elastic_norms import train_norms
from tests.lora import data_of, recover, words
from tests.runs import prune, tiny_config
from tests.test_elastic import elastic_of, logits, places
from tests.test_materialize import save_base
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer


def norms_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 1 and n.endswith(".weight")}


def shifted(model: PreTrainedModel, by: float) -> dict[str, torch.Tensor]:
    return {name: weight + by for name, weight in norms_of(model).items()}


def arguments_for(folder: Path, **changes) -> TrainingArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"learning_rate": 0.05, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"report_to": "none"}
    return TrainingArguments(output_dir=str(folder / "trainer"), **{**settings, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_width_has_its_norms_and_the_widths_between_mix_them(tmp_path: Path, family: str) -> None:
    model, trajectory = elastic_of(family)
    base, where = norms_of(model), places(model)
    set_norms(model.set_sparsity(0.2), {0.2: shifted(model, 0.1), 0.4: shifted(model, 0.5)})
    assert model.sparsity == 0.2
    folder = save_elastic(model, tmp_path / "elastic", trajectory=trajectory)
    assert model.sparsity == 0.2
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    part = AutoModelForCausalLM.from_pretrained(folder, sparsity=0.3)
    for sparsity, by in ((0.4, 0.5), (0.0, 0.0), (0.2, 0.1), (0.3, 0.3), (0.1, 0.05), (0.5, 0.5)):
        expected, _ = elastic_of(family)
        expected.set_sparsity(sparsity)
        for name, weight in norms_of(expected).items():
            expected.get_parameter(name).data = weight + by
        found = [model.set_sparsity(sparsity), model.at(sparsity), loaded.set_sparsity(sparsity), loaded.at(sparsity)]
        found += [part.set_sparsity(sparsity), part.at(sparsity)] if sparsity >= 0.3 else []
        for elastic in found:
            torch.testing.assert_close(logits(elastic), logits(expected))
            for name, weight in norms_of(elastic).items():
                torch.testing.assert_close(weight, base[name] + by)
                if sparsity in (0.0, 0.2, 0.4):
                    assert torch.equal(weight, base[name] + by)
    matrices = {name: place for name, place in places(model).items() if name not in base}
    assert matrices.items() <= where.items()


def test_a_model_at_another_width_keeps_its_norms(tmp_path: Path) -> None:
    model, trajectory = elastic_of()
    base = norms_of(model)
    set_norms(model, {0.4: shifted(model, 0.5)})
    draft = model.at(0.4)
    model.set_sparsity(0.2)
    assert all(torch.equal(weight, base[name] + 0.5) for name, weight in norms_of(draft).items())
    before = logits(model)
    assert torch.equal(logits(model.double().float()), before)  # `to` keeps them at any width
    assert model.set_sparsity(0.4).bfloat16().model.norm.weight.dtype == torch.bfloat16
    model.float().set_sparsity(0.2)
    model.save_pretrained(tmp_path / "level")  # an ordinary level, with the norms of its width
    level = AutoModelForCausalLM.from_pretrained(tmp_path / "level")
    torch.testing.assert_close(logits(level), logits(model))
    torch.testing.assert_close(
        norms_of(level), {name: weight + 0.25 for name, weight in base.items()}, atol=4e-3, rtol=0
    )
    assert "weight_of_levels" not in " ".join(level.state_dict())
    set_norms(model, {0.5: shifted(model, 1.0)})  # in place of the others
    assert model.config.elastic["norms"] == [0.0, 0.5] and model.sparsity == 0.2


def test_training_is_that_of_the_saved_level(tmp_path: Path) -> None:
    model = tiny_model()
    base = save_base(model, tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    prune(model, tmp_path, config=tiny_config(num_steps=2, sparsity_levels=(0.2, 0.4)))
    elastic = AutoModelForCausalLM.from_pretrained(
        write_elastic(tmp_path / "levels", tmp_path / "plain", base_model=base)
    )
    before = {name: parameter.detach().clone() for name, parameter in elastic.named_parameters()}
    norms, facts = train_norms(elastic, data_of(tmp_path), arguments_for(tmp_path), widths=(0.2, 0.4))
    assert all(torch.equal(parameter, before[name]) for name, parameter in elastic.named_parameters())
    assert list(norms) == [0.2, 0.4] and facts["0.4"]["steps"] == 4 and facts["0.4"]["loss"] > 0
    options = {"train": "norms", "learning_rate": 0.05, "data": data_of(tmp_path)}
    for level, found in norms.items():
        name = f"sparsity-{level:.2f}"
        trained = recover(tmp_path / "levels" / name, tmp_path / "recovered" / name, **options)
        expected = norms_of(AutoModelForCausalLM.from_pretrained(trained))
        assert any(not torch.equal(weight, before[name]) for name, weight in found.items())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_command_trains_norms_and_says_so(tmp_path: Path, capsys) -> None:
    model = tiny_model()
    base = save_base(model, tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    prune(model, tmp_path, config=tiny_config(num_steps=2, sparsity_levels=(0.3, 0.5)))
    command = ["elastic", str(tmp_path / "levels"), "--base-model", str(base), "--tokens", "512"]
    command += ["--norms", "all", "--output"]
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "norms are trained on the calibration text" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    folder = tmp_path / "elastic"
    assert main([*command, str(folder), "--data", str(words(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert "50%: norms trained on 512 tokens" in said
    facts = json.loads((folder / "elastic.json").read_text())
    assert facts["weights"] == {"0": 12.0, "0.3": 1.0, "0.5": 1.0}
    facts = facts["norms"]
    assert list(facts) == ["0", "0.3", "0.5"] and facts["0.5"]["objective"] == "language_modeling"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.elastic["norms"] == [0.0, 0.3, 0.5]
    full = norms_of(loaded)
    assert any(not torch.equal(weight, norms_of(tiny_model())[name]) for name, weight in full.items())
    assert any(not torch.equal(weight, full[name]) for name, weight in norms_of(loaded.set_sparsity(0.5)).items())


def test_full_width_weighs_more_where_the_norms_repair_the_levels(tmp_path: Path) -> None:
    model = tiny_model()
    base = save_base(model, tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    prune(model, tmp_path, config=tiny_config(num_steps=2, sparsity_levels=(0.5,)))
    command = ["elastic", str(tmp_path / "levels"), "--base-model", str(base), "--tokens", "512", "--norms", "levels"]
    command += ["--data", str(words(tmp_path)), "--output"]
    for options, weight in ([], 100.0), (["--full-weight", "7"], 7.0):
        folder = tmp_path / f"elastic-{weight:g}"
        assert main([*command, str(folder), *options]) == 0
        assert json.loads((folder / "elastic.json").read_text())["weights"] == {"0": weight, "0.5": 1.0}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, _ = elastic_of()
    text = data_of(tmp_path)
    with pytest.raises(ValueError, match="has one width"):
        train_norms(tiny_model(), text, arguments_for(tmp_path), widths=(0.2,))
    with pytest.raises(ValueError, match="sparsity 0.95 lies beyond"):
        train_norms(model, text, arguments_for(tmp_path), widths=(0.2, 0.95))
    choices = tmp_path / "choices.jsonl"
    choices.write_text(
        "".join(json.dumps({"prompt": "w5 w8", "correct": "w6", "incorrect": ["w7"]}) + "\n" for _ in range(4))
    )
    margins = load_calibration(str(choices), tiny_tokenizer(), objective="margin", tokens=None)
    assert margins.loss is margin_loss
    with pytest.raises(ValueError, match="targets that are tokens"):
        train_norms(model, margins, arguments_for(tmp_path), widths=(0.2,))
    with pytest.raises(FloatingPointError, match="not finite"):
        train_norms(model, text, arguments_for(tmp_path, learning_rate=1e38, max_steps=3), widths=(0.2,))
    model.set_sparsity(0.2)
    with pytest.raises(ValueError, match="no sparsity above 0"):
        set_norms(model, {0.0: shifted(model, 0.1)})
    with pytest.raises(ValueError, match=r"norms at sparsity 0.2 have no model.norm.weight of shape \(\d+,\)"):
        set_norms(model, {0.2: {**shifted(model, 0.1), "model.norm.weight": torch.ones(3)}})
    assert model.config.elastic["norms"] == [] and model.sparsity == 0.2
