"""The quickstart's own functions, on a tiny model: everything but the size is real."""

import json
import re
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf import GISPConfig, RestoreConfig, Trajectory
from gisp_hf.cli.main import main as gisp_hf
from gisp_hf.evaluation import perplexity
from recipes import benchmark_levels, quickstart
from recipes.demo_data import Domain
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer

CONFIG = GISPConfig(num_steps=4, protect_first=1, sparsity_levels=(0.2, 0.5))


def held_out_tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(4, 64, (512,), generator=generator) for name in ("wikipedia", "news", "code")}


@pytest.mark.slow
@pytest.mark.parametrize("one_shot", [False, True])
def test_quickstart_measures_what_it_says(one_shot, tmp_path, capsys) -> None:
    restore = None if one_shot else RestoreConfig(tokens=256)
    folder = tmp_path / "quickstart"
    rows = quickstart.run(
        tiny_model(),
        tiny_tokenizer(),
        blocks=tiny_blocks(64),
        held_out=held_out_tokens(),
        output_dir=folder,
        config=CONFIG,
        restore=restore,
        one_shot=one_shot,
        prompt="w5 w6",
    )
    assert [row["level"] for row in rows] == ["dense", "sparsity-0.20", "sparsity-0.50"]
    dense, mild, strong = rows
    assert dense["parameters"] == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert dense["parameters"] > mild["parameters"] > strong["parameters"]
    layers = sum(parameter.numel() for parameter in tiny_model().model.layers.parameters())
    assert dense["parameters"] - strong["parameters"] == round(strong["sparsity"] * layers)
    assert strong["channels_removed"] > mild["channels_removed"] >= 0
    assert 0 < mild["seconds"] < strong["seconds"]
    assert all(("one_shot" in row) == one_shot for row in (mild, strong))
    assert json.loads((folder / "results.json").read_text()) == rows

    captured = capsys.readouterr()
    table = (folder / "results.md").read_text().strip()
    assert table in captured.out and ("one shot" in table) == one_shot
    assert "pruning" in captured.err and "8/8" in captured.err  # 4 steps of 2 batches
    # the numbers that were measured on the way are those of the checkpoints that lie there
    assert all((row["pruned"] is None) == one_shot for row in (mild, strong))
    if restore is not None:  # the order, and what it gives unrestored, are those of a run without restoration
        trajectory = Trajectory.load(folder)
        unrestored = trajectory.apply(tiny_model(), sparsity=0.5)
        values = [perplexity(unrestored, tokens, window=256) for tokens in held_out_tokens().values()]
        assert strong["pruned"] == pytest.approx(statistics.geometric_mean(values), rel=1e-5)
        assert strong["pruned"] != strong["perplexity"] and "before restoration" in captured.out
    for row in (mild, strong):
        saved = AutoModelForCausalLM.from_pretrained(folder / row["level"])
        for domain, tokens in held_out_tokens().items():
            assert perplexity(saved, tokens, window=256) == pytest.approx(row[domain], rel=1e-5)
        assert row["perplexity"] ** 3 == pytest.approx(row["wikipedia"] * row["news"] * row["code"])
        assert (
            f"{row['level']} after" in captured.out and row["text"].startswith("w5 w6") and row["text"] in captured.out
        )
    for name in ("perplexity.png", "removed.png", "loss.png"):
        assert (folder / name).stat().st_size > 10_000

    # as the last lines say
    assert gisp_hf(["levels", str(folder)]) == 0
    assert "sparsity-0.50" in capsys.readouterr().out
    assert gisp_hf(["card", str(folder), "--level", "0.2"]) == 0
    assert str(folder) in quickstart.next_steps(folder)

    speeds = benchmark_levels.run(tiny_model(), folder, repeats=1)
    assert [row["level"] for row in speeds] == ["dense", "sparsity-0.20", "sparsity-0.50"]
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in speeds)
    assert [row["parameters"] for row in speeds] == [row["parameters"] for row in rows]
    assert (folder / "speed.md").read_text().strip() in capsys.readouterr().out


def test_a_second_run_goes_to_a_folder_of_its_own(tmp_path) -> None:
    first = tmp_path / "quickstart"
    assert quickstart.free_folder(first) == first
    first.mkdir()
    assert quickstart.free_folder(first) == first  # empty
    (first / "results.md").touch()
    assert quickstart.free_folder(first) == tmp_path / "quickstart-2"
    (tmp_path / "quickstart-2" / "sparsity-0.20").mkdir(parents=True)
    assert quickstart.free_folder(first) == tmp_path / "quickstart-3"
    assert (first / "results.md").exists() and not (tmp_path / "quickstart-3").exists()


@pytest.mark.slow
def test_the_commands_work_as_their_headers_say(tmp_path, monkeypatch, capsys) -> None:
    """Two runs one after the other, with the real text and a model of another size in place of the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "load_smollm2", lambda dtype: (tiny_model(dtype=dtype), tiny_tokenizer()))
    monkeypatch.setattr(benchmark_levels, "load_smollm2", lambda dtype: (tiny_model(dtype=dtype), tiny_tokenizer()))
    texts = Domain(*[[" ".join(f"w{4 + i % 60}" for i in range(2000))] * 4] * 2)
    monkeypatch.setattr(quickstart, "load_domains", lambda: {"wikipedia": texts, "news": texts, "code": texts})
    with pytest.raises(SystemExit):
        benchmark_levels.main([])
    assert "make quickstart" in capsys.readouterr().err
    small = ["--num-steps", "4", "--num-blocks", "8", "--test-tokens", "512", "--restore-tokens", "768"]
    quickstart.main(small)
    first = capsys.readouterr().out
    assert re.match(r"(float32|bfloat16) weights \(float32 [\d,.]+, bfloat16 [\d,.]+ GFLOP/s\)", first)
    assert "Everything is in runs/quickstart:" in first and "gisp-hf levels runs/quickstart\n" in first
    before = (tmp_path / "runs" / "quickstart" / "results.md").stat().st_mtime_ns
    quickstart.main([*small, "--dtype", "float32"])
    second = capsys.readouterr().out
    assert second.startswith("runs/quickstart holds the results of an earlier run; this one goes to runs/quickstart-2")
    assert "Everything is in runs/quickstart-2:" in second and "float32 weights" in second
    assert (tmp_path / "runs" / "quickstart" / "results.md").stat().st_mtime_ns == before
    benchmark_levels.main(["--repeats", "1"])
    assert (tmp_path / "runs" / "quickstart" / "speed.md").is_file()
