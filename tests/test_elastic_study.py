"""The study of elastic checkpoints on a tiny model and tiny texts: everything but the size is real."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf.evaluation import perplexity
from gisp_hf.levels.elastic import make_elastic, save_elastic
from recipes import demo_data, elastic_study, low_rank_gap, restore_study
from recipes.demo_data import held_out_tokens, load_domain
from tests.test_materialize import random_trajectory
from tests.tiny import tiny_model, tiny_tokenizer


def words(seed: int, low: int, high: int) -> str:
    numbers = torch.randint(low, high, (300,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


@pytest.mark.slow
def test_numbers_are_those_of_the_models(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bounds = {"wikipedia": (4, 40), "news": (20, 60), "code": (40, 64)}
    texts = {name: [words(seed, *bounds[name]) for seed in range(8)] for name in bounds}
    for name in bounds:
        monkeypatch.setitem(demo_data.DOMAINS, name, lambda name=name: texts[name])
    monkeypatch.setattr(elastic_study, "load_smollm2", lambda dtype: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setattr(elastic_study, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(elastic_study, "WINDOW", 64)
    monkeypatch.setattr(restore_study, "BLOCK", 16)
    tiny_model().save_pretrained(tmp_path / "base")
    random_trajectory(tiny_model(), tmp_path / "base").save(tmp_path / "run")
    command = ["--run", str(tmp_path / "run"), "--base", str(tmp_path / "base"), "--work", str(tmp_path / "work")]
    command += ["--output-dir", str(tmp_path / "results"), "--evaluation-tokens", "256", "--tokens", "192"]
    command += ["--widths", "0", "0.4", "--new-tokens", "4"]
    for streams in ("none", "unpruned", "own"):
        elastic_study.main([*command, "--streams", streams])
    elastic_study.main([*command, "--full-weight", "12", "--norms", "levels", "--norm-tokens", "1024"])
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    normed = files.pop("unpruned-192-full12-norms_levels-1024")
    assert files.keys() == {"unrestored", "unpruned-192-full12", "own-192-full12-blend0.5"}
    assert list(normed["norms"]) == ["0.2", "0.3", "0.4", "0.5"] and normed["norms"]["0.5"]["tokens"] == 1024
    assert normed["0 news"] == files["unpruned-192-full12"]["0 news"]  # the full width keeps its norms
    assert normed["0.4 news"] != files["unpruned-192-full12"]["0.4 news"]
    ids = held_out_tokens(load_domain("news").held_out, tiny_tokenizer(), count=256)
    assert files["unrestored"]["0 news"] == pytest.approx(perplexity(tiny_model(), ids, window=64))
    for facts in files.values():
        assert facts["drafting"]["same_text"] and 0 <= facts["drafting"]["acceptance"] <= 1
        assert facts["drafting"]["new_tokens"] == 4
    assert files["own-192-full12-blend0.5"]["fit"]["errors"]["0.5"][1] > 0
    assert "geometric mean" in capsys.readouterr().out
    elastic_study.main([*command, "--streams", "none"])  # everything is there
    assert "unrestored 0 news:" not in capsys.readouterr().out


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_best_matrix_of_a_rank_is_that_of_the_whole_inputs(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 8, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 9).double())
    change = torch.randn(10, 8, generator=generator, dtype=torch.float64)
    left, right = low_rank_gap.factors_of(change, inputs.T @ inputs)
    found = left[:, :rank] @ right[:rank]
    u, s, v = torch.linalg.svd(change @ inputs.T, full_matrices=False)  # of all outputs at once
    torch.testing.assert_close(found @ inputs.T, (u[:, :rank] * s[:rank]) @ v[:rank])
    assert torch.linalg.matrix_rank(found) == rank


@pytest.mark.slow
def test_low_rank_corrections_lead_from_shared_weights_to_those_of_the_level(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, name in enumerate(("wikipedia", "news", "code")):
        monkeypatch.setitem(
            demo_data.DOMAINS, name, lambda number=number: [words(8 * number + n, 4, 60) for n in range(8)]
        )
    monkeypatch.setattr(restore_study, "load_smollm2", lambda dtype: (tiny_model(dtype=dtype), tiny_tokenizer()))
    monkeypatch.setattr(restore_study, "BLOCK", 16)
    model = tiny_model()
    trajectory = random_trajectory(model, "some/base")
    elastic = make_elastic(model, trajectory, levels=(0.5,))
    save_elastic(elastic, tmp_path / "elastic", trajectory=trajectory)
    level = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic", sparsity=0.5)
    plain = level.save_pretrained(tmp_path / "level") or AutoModelForCausalLM.from_pretrained(tmp_path / "level")
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.down_proj.weight.mul_(1.1)
    plain.save_pretrained(tmp_path / "level")
    command = [str(tmp_path / "elastic"), str(tmp_path / "level"), "--ranks", "2", "--tokens", "192"]
    command += ["--evaluation-tokens", "256", "--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "out")]
    low_rank_gap.main(command)
    rows = json.loads((tmp_path / "out" / "level-0.5.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [0, 2, "full"]
    ids = held_out_tokens(load_domain("news").held_out, tiny_tokenizer(), count=256)
    assert rows[0]["news"] == pytest.approx(perplexity(level, ids, window=256), rel=1e-4)
    assert rows[2]["news"] == pytest.approx(perplexity(plain, ids, window=256), rel=1e-4)
    assert 0 < rows[1]["weight"] < rows[2]["weight"]
    assert "of the file" in capsys.readouterr().out
