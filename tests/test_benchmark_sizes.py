"""The benchmark of sizes on a tiny model and tiny texts: everything but the size is real."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf import Trajectory
from gisp_hf.evaluation import perplexity
from gisp_hf.models import discover
from gisp_hf.models.surgery import pruned_shell, zero_structures
from recipes import benchmark_sizes, demo_data, knapsack_rounding
from recipes.benchmark_sizes import main, measure_shape, random_trajectory, run, write_report
from recipes.compare_settings import Comparison
from recipes.knapsack_rounding import in_multiples
from tests.test_compare import SMALL, words
from tests.test_selection import toy_layout
from tests.tiny import tiny_model, tiny_tokenizer

SETUP = Comparison(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in SMALL.items() if key != "fast"}
    | {"methods": ("gisp",), "levels": (0.2, 0.3), "dtype": "float32"}
)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model and three domains of different words; multiples that suit its 24 channels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    bounds = {"wikipedia": (4, 40), "news": (20, 60), "code": (40, 64)}
    texts = {name: [words(seed, *bounds[name]) for seed in range(8)] for name in bounds}
    for name in bounds:
        monkeypatch.setitem(demo_data.DOMAINS, name, lambda name=name: texts[name])
    monkeypatch.setattr(benchmark_sizes, "MULTIPLES", (1, 4))
    monkeypatch.setattr(benchmark_sizes, "BEYOND", 0.15)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    return tmp_path


@pytest.mark.slow
def test_every_multiple_is_cut_from_one_run_and_measured(here, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    text = run(SETUP, Path("out"), work=Path("work"), repeats=1)
    results = json.loads(Path("out/results.json").read_text())
    trajectory = Trajectory.load("out")
    assert trajectory.config.sparsity_levels == (0.2, 0.3, 0.45) and not list(Path("work").glob("levels*/sparsity*"))
    rows = {(row["level"], row["multiple"]): row for row in results["perplexity"]}
    assert list(rows) == [(0.0, None), (0.2, 1), (0.2, 4), (0.3, 1), (0.3, 4)]
    held_out = {
        name: demo_data.held_out_tokens(load()[3::4], tiny_tokenizer(), count=256)
        for name, load in demo_data.DOMAINS.items()
    }

    def measured(model) -> float:
        found = [perplexity(model, tokens, window=64) for tokens in held_out.values()]
        return math.prod(found) ** (1 / 3)

    def unrounded(sparsity: float) -> float:
        """Multiple 1 at exactly this sparsity: between the last cut below and the first one above."""
        sparsities = [trajectory.sparsity_at(length, channel_multiple=1) for length in range(len(trajectory) + 1)]
        above = next(length for length, found in enumerate(sparsities) if found >= sparsity - 1e-9)
        means = []
        for length in (above - 1, above):
            model = tiny_model()
            for block, order in zip(trajectory.layout.blocks, trajectory.order):
                zero_structures(model, block, ((order >= 0) & (order < length)).nonzero().squeeze(1))
            means.append(math.log(measured(model)))
        part = (sparsity - sparsities[above - 1]) / (sparsities[above] - sparsities[above - 1])
        return math.exp(means[0] + part * (means[1] - means[0]))

    for (level, multiple), row in list(rows.items())[1:]:
        assert row["reached"] >= level
        model = trajectory.apply(tiny_model(), sparsity=level, channel_multiple=multiple)
        assert not any(block.size % multiple for block in discover(model).blocks if block.kind == "mlp")
        assert row["geometric_mean"] == pytest.approx(measured(model), rel=1e-5)
        expected = 0 if multiple == 1 else row["geometric_mean"] / unrounded(row["reached"]) - 1
        assert row["cost"] == pytest.approx(expected, abs=1e-4)
    assert [(row["level"], row["model"]) for row in results["speed"]] == [
        (level, name) for level in (0.2, 0.3) for name in ("dense", "1", "4")
    ]
    for row in results["speed"]:
        same = {other["model"]: other for other in results["speed"] if other["level"] == row["level"]}
        assert row["prefill_to_one"] == pytest.approx(row["prefill"] / same["1"]["prefill"])
        assert row["decode_to_dense"] == pytest.approx(row["decode"] / same["dense"]["decode"])
    assert Path("out/sizes.png").stat().st_size > 10_000 and Path("out/results.md").read_text() == text

    before = {name: Path(f"out/{name}").read_bytes() for name in ("trajectory.json", "trajectory.safetensors")}
    monkeypatch.setattr(benchmark_sizes, "make_trajectory", None)  # speed alone does not prune
    run(SETUP, Path("out"), work=Path("work"), repeats=1, speed_only=True)
    again = json.loads(Path("out/results.json").read_text())
    assert again["perplexity"] == results["perplexity"] and again["speed"] != results["speed"]
    assert all(Path(f"out/{name}").read_bytes() == data for name, data in before.items())
    assert write_report(Path("out")) == Path("out/results.md").read_text()

    found = knapsack_rounding.run(SETUP, Path("out"), multiples=(1, 4))
    for row in found:
        assert row["up"] == pytest.approx(rows[row["level"], row["multiple"]]["geometric_mean"], rel=1e-5)
        if row["multiple"] > 1:
            assert row["up_cost"] == pytest.approx(rows[row["level"], row["multiple"]]["cost"], abs=1e-5)
        order = knapsack_rounding.with_knapsack(trajectory, row["multiple"])
        assert row["knapsack_reached"] == order.sparsity_at(
            order.prefix(row["level"], channel_multiple=row["multiple"]), channel_multiple=row["multiple"]
        )
        if row["multiple"] == 1:
            assert row["knapsack"] == pytest.approx(row["up"], rel=1e-5)
    assert json.loads(Path("out/knapsack.json").read_text()) == found


@pytest.mark.slow
def test_a_shape_is_measured_without_any_weights(here, capsys) -> None:
    rows = measure_shape("tiny", levels=(0.3,), repeats=1, prompt_tokens=8, new_tokens=2)
    assert [(row["batch_size"], row["model"]) for row in rows] == [(b, n) for b in (1, 16) for n in ("dense", "1", "4")]
    dense = AutoModelForCausalLM.from_pretrained("model")
    trajectory = random_trajectory(dense, end=0.45)
    for multiple in (1, 4):
        counts = [len(keep) for keep in trajectory.kept(0.3, channel_multiple=multiple)]
        shell = pruned_shell(dense, trajectory.layout, counts)
        assert 1 - discover(shell).total / discover(dense).total >= 0.3
        assert [block.size for block in discover(shell).blocks] == counts
    main(["--shape", "tiny", "--repeats", "1", "--output-dir", "shapes"])
    assert json.loads(Path("shapes/tiny.json").read_text())["shape"] == "tiny"
    assert "prefill, tokens/s" in capsys.readouterr().out


def test_the_knapsack_takes_items_by_their_mean_position() -> None:
    layout = toy_layout(sizes=((2, 5), (2, 5)))
    order = [
        torch.tensor(positions, dtype=torch.int32)
        for positions in ([1, -1], [0, 4, 5, 9, 2], [-1, -1], [3, 6, 7, 8, -1])
    ]
    # items leave 4, 2, 0 channels, with means 0, 3, 7 in block 1 and 3, 6.5 in block 3, where one channel is left over
    found = in_multiples(layout, order, {"mlp": 2})
    expected = [(1, [0]), (0, [0]), (1, [4, 1]), (3, [0]), (3, [1, 2]), (1, [2, 3]), (3, [3])]
    flat = [(number, index) for number, item in expected for index in item]
    assert [int(found[number][index]) for number, index in flat] == list(range(len(flat)))
    assert [int((positions >= 0).sum()) for positions in found] == [1, 5, 0, 4]
    again = in_multiples(layout, found, {"mlp": 2})
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert all(torch.equal(a, b) for a, b in zip(in_multiples(layout, order, {}), order))
