"""The comparison of methods on a tiny model and tiny texts: everything but the size is real."""

import json
import math
import shutil
import statistics
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from gisp_hf.evaluation import perplexity
from gisp_hf.pruning.methods import METHODS
from recipes import compare, compare_results, demo_data
from recipes.compare import main, run_cell
from recipes.compare_results import read_cell, read_cells, write_report
from recipes.compare_settings import Cell, Comparison, read_config
from tests.tiny import tiny_model, tiny_tokenizer

RESULTS = Path(compare.__file__).parent / "results" / "compare"
SMALL = {
    "models": ["model"],
    "methods": ["gisp", "magnitude"],
    "calibrations": {"wikipedia": "wikipedia", "mixture": "wikipedia:1/3,news:1/3,code:1/3"},
    "seeds": [0, 1],
    "levels": [0.2, 0.4],
    "tokens": 192,
    "block_size": 16,
    "batch_size": 4,
    "num_steps": 3,
    "evaluation_tokens": 256,
    "window": 64,
    "questions": 4,
    "fresh": False,
    "leading": None,
    "fast": {"seeds": [0], "levels": [0.3]},
}


def words(seed: int, low: int, high: int) -> str:
    numbers = torch.randint(low, high, (300,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model and three domains of different words."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    bounds = {"wikipedia": (4, 40), "news": (20, 60), "code": (40, 64)}
    texts = {name: [words(seed, *bounds[name]) for seed in range(16)] for name in bounds}
    for name in bounds:
        monkeypatch.setitem(demo_data.DOMAINS, name, lambda name=name: texts[name])
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    return tmp_path


def config(**changes) -> Path:
    path = Path("compare.yaml")
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return path


def comparison(**changes) -> Comparison:
    return read_config(config(**changes), changes={"dtype": "float32"})


class Runs:
    """Runs cells in this process, and counts them."""

    def __init__(self, setup: Comparison, *, last: int | None = None) -> None:
        self.setup, self.last, self.cells = setup, last, []

    def __call__(self, cell: Cell) -> None:
        if len(self.cells) == self.last:
            raise KeyboardInterrupt
        self.cells.append(cell)
        run_cell(cell, self.setup, Path("out"))


def result(*, method: str = "gisp", seed: int | None = 0, factor: float = 1.0) -> dict:
    """A result written by hand."""
    dense = method == "dense"
    setup = comparison()
    cell = Cell("model", "dense") if dense else Cell("model", method, "mixture", seed)
    levels = []
    for level in [0.0] if dense else [0.2, 0.4]:
        found = {"wikipedia": 10 * factor + 100 * level, "news": 20 * factor, "code": 40 * factor}
        mean = math.prod(found.values()) ** (1 / 3)
        levels.append({"sparsity": level, "removed": level, "parameters": 1000, "perplexity": found})
        levels[-1] |= {"geometric_mean": mean, "accuracy": 0.5, "prefill": 1000.0 * factor, "prefill_ratio": factor}
    return {
        "format": 2,
        "settings": setup.settings(cell),
        "environment": {"python": "3.11"},
        "calibration": None if dense else {"tokens": 192},
        "steps": 0 if dense else 3,
        "tokens_used": 0 if dense else 576,
        "seconds": 0.0 if dense else 2.0,
        "cpu_seconds": 0.0 if dense else 1.0,
        "evaluation_seconds": 1.0,
        "peak_memory": 10**9,
        "levels": levels,
    }


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_writes_one_file_a_cell_and_measures_what_it_says(here) -> None:
    setup = comparison(seeds=[3])
    runs = Runs(setup)
    report = compare.compare(setup, Path("out"), run=runs)
    assert sorted(str(path) for path in Path("out").rglob("*.json")) == [
        "out/model/dense.json",
        "out/model/gisp-mixture-seed3.json",
        "out/model/gisp-wikipedia-seed3.json",
        "out/model/magnitude.json",
    ]
    cells = {path.stem: read_cell(path) for path in Path("out/model").glob("*.json")}
    dense = cells["dense"]["levels"][0]
    for name, load in demo_data.DOMAINS.items():
        held_out = demo_data.held_out_tokens(load()[3::4], tiny_tokenizer(), count=256)
        assert dense["perplexity"][name] == pytest.approx(perplexity(tiny_model(), held_out, window=64), rel=1e-5)
    expected = math.exp(statistics.fmean(math.log(value) for value in dense["perplexity"].values()))
    assert dense["geometric_mean"] == pytest.approx(expected)
    assert dense["parameters"] == sum(parameter.numel() for parameter in tiny_model().parameters())

    gisp, magnitude = cells["gisp-mixture-seed3"], cells["magnitude"]
    assert (gisp["steps"], gisp["tokens_used"]) == (3, 576)
    assert (magnitude["steps"], magnitude["tokens_used"]) == (1, 0)  # a method keeps its steps, and may read no data
    assert magnitude["calibration"] is None
    assert [part["tokens"] for part in gisp["calibration"]["parts"]] == [64, 64, 64]
    assert cells["gisp-wikipedia-seed3"]["calibration"]["tokens"] == 192
    assert cells["gisp-wikipedia-seed3"]["calibration"]["sha256"] != gisp["calibration"]["sha256"]
    for cell in (gisp, magnitude):
        assert [level["sparsity"] for level in cell["levels"]] == [0.2, 0.4]
        for level in cell["levels"]:
            layers = sum(parameter.numel() for parameter in tiny_model().model.layers.parameters())
            assert dense["parameters"] - level["parameters"] == round(level["removed"] * layers)
            assert level["removed"] == pytest.approx(level["sparsity"], abs=0.02)
        assert cell["seconds"] > 0 and cell["evaluation_seconds"] > 0 and cell["peak_memory"] > 10**7
    assert (here / "out" / "results.md").read_text() == report
    assert [path.name for path in Path("runs/compare").iterdir() if path.is_dir()] == []  # no level is left behind


@pytest.mark.slow
def test_whole_layers_are_compared_by_the_parameters_that_they_reach() -> None:
    setup = comparison(methods=["shortgpt"], seeds=[3])
    run_cell(Cell("model", "shortgpt", "mixture", 3), setup, Path("out"))
    found = read_cell(Path("out/model/shortgpt-mixture-seed3.json"))
    assert (found["steps"], found["tokens_used"]) == (1, 192)
    one = sum(parameter.numel() for parameter in tiny_model().model.layers[0].parameters())
    dense = sum(parameter.numel() for parameter in tiny_model().parameters())
    for level, layers in zip(found["levels"], (2, 3)):  # of 6, at 0.2 and 0.4
        assert level["removed"] == pytest.approx(layers / 6)
        assert level["parameters"] == dense - layers * one


@pytest.mark.slow
def test_a_second_run_prunes_nothing(monkeypatch) -> None:
    setup = comparison(methods=["magnitude"], seeds=[0])
    first = compare.compare(setup, Path("out"), run=Runs(setup))

    def never(*args, **kwargs):
        raise AssertionError("pruned again")

    monkeypatch.setattr(compare, "prune", never)
    monkeypatch.setattr(compare, "load_model", never)
    runs = Runs(setup)
    assert compare.compare(setup, Path("out"), run=runs) == first and runs.cells == []


@pytest.mark.slow
def test_a_killed_comparison_goes_on() -> None:
    setup = comparison(methods=["magnitude", "wanda-sp"], seeds=[0])
    killed, rest = Runs(setup, last=3), Runs(setup)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(setup, Path("out"), run=killed)
    kept = {path: path.read_bytes() for path in Path("out").rglob("*.json")}
    assert len(kept) == 3 and not Path("out/results.md").exists()
    left = Path("runs/compare") / compare_results.slug(setup.cells()[3].file) / "levels" / "sparsity-0.20"
    left.mkdir(parents=True)  # as a kill leaves it
    (left / "config.json").touch()
    compare.compare(setup, Path("out"), run=rest)
    assert killed.cells + rest.cells == setup.cells() and len(rest.cells) == 1
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not left.parents[1].exists()


@pytest.mark.slow
def test_a_cell_with_other_settings_runs_again(capsys) -> None:
    setup = comparison(methods=["magnitude"], calibrations={"mixture": "news:1/2,code:1/2"}, seeds=[0])
    compare.compare(setup, Path("out"), run=Runs(setup))
    longer = comparison(methods=["magnitude"], calibrations={"mixture": "news:1/2,code:1/2"}, seeds=[0], window=128)
    runs = Runs(longer)
    compare.compare(longer, Path("out"), run=runs)
    assert runs.cells == longer.cells()
    assert "dense.json was made with window 64, now 128: it runs again" in capsys.readouterr().out


@pytest.mark.slow
def test_a_method_of_one_file_from_outside_appears_in_the_table(here, monkeypatch) -> None:
    (here / "biggest_first.py").write_text(
        textwrap.dedent("""
        from gisp_hf.criteria.magnitude import Magnitude
        from gisp_hf.pruning.methods import Method, register_method

        class Biggest(Magnitude):
            def scores(self, layout, blocks, sums):
                return [-score for score in super().scores(layout, blocks, sums)]

        register_method("biggest-first", Method(Biggest, num_steps=1))
        """)
    )
    monkeypatch.syspath_prepend(here)
    try:
        setup = comparison(imports=["biggest_first"], methods=None, seeds=[0], levels=[0.3])
        assert setup.methods == tuple(METHODS) and "biggest-first" in setup.methods
        setup = comparison(imports=["biggest_first"], methods=["magnitude", "biggest-first"], seeds=[0], levels=[0.3])
        report = compare.compare(setup, Path("out"), run=Runs(setup))
    finally:
        METHODS.pop("biggest-first", None)
    assert len([line for line in report.splitlines() if "| biggest-first" in line]) == 2  # quality and cost
    own, other = (read_cell(Path(f"out/model/{name}.json")) for name in ("biggest-first", "magnitude"))
    assert own["levels"] != other["levels"]
    assert write_report(Path("out")) == report  # and the files alone need no method


@pytest.mark.slow
def test_the_command_runs_each_cell_in_its_own_process(here, capfd, monkeypatch) -> None:
    """With the real texts, as a new process reads them; the fast section of the settings."""
    root = Path(compare.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    path = config(methods=["wanda-sp"], calibrations={"mixture": "news:1/2,code:1/2"}, evaluation_tokens=512)
    command = [str(path), "--fast", "--dtype", "float32", "--output-dir", "out"]
    main(command)
    said = capfd.readouterr().out
    assert "2 cells, 0 of them done before" in said and "1/2: model/dense.json" in said
    cells = read_cells(Path("out"))
    assert [cell["settings"]["method"] for cell in cells] == ["dense", "wanda-sp"]
    assert cells[1]["settings"]["levels"] == [0.3] and cells[1]["levels"][0]["sparsity"] == 0.3
    main(command)
    assert "2 cells, 2 of them done before" in capfd.readouterr().out
    main([*command, "--report"])
    assert Path("out/results.md").read_text() in capfd.readouterr().out
    (here / "model" / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="model/wanda-sp-mixture-seed1.json failed with exit code 1"):
        main([*command, "--seeds", "1"])


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_default_settings_are_those_that_the_page_describes() -> None:
    path = Path(compare.__file__).parent / "compare.yaml"
    full = read_config(path, changes={"dtype": "float32"})
    assert full.levels == (0.2, 0.3, 0.4, 0.5) and full.seeds == (0, 1, 2)
    restored = ("gisp-restored", "gisp-activation-restored")
    assert full.methods == (*METHODS, *restored)
    assert full.calibrations == {"mixture": "wikipedia:1/3,news:1/3,code:1/3", "wikipedia": "wikipedia"}
    assert full.models == ("smollm2",) and full.evaluation_tokens == 8192
    fast = read_config(path, fast=True, changes={"dtype": "float32"})
    assert fast.evaluation_tokens == 4096 and len(fast.levels) == 2 and len(fast.seeds) == 1
    data = [name for name in full.methods if full.reads_data(name)]
    assert full.leading is not None and set(full.leading) < set(data)
    assert full.once == ("gisp-uniform", "flap-compensated", "wanda-sp-owl", "second-order-tyr", *restored)
    with_data = 2 * len(data) - len(full.once) + 2 * len(full.leading)
    assert len(full.cells()) == 1 + (len(full.methods) - len(data)) + with_data


def test_variants_are_methods_with_other_settings() -> None:
    setup = comparison(
        methods=["gisp", "slow"], variants={"slow": {"method": "wanda-sp", "num_steps": 7, "tokens": 32, "fresh": True}}
    )
    own, slow = setup.variant("gisp"), setup.variant("slow")
    assert (own.config.method, own.config.num_steps, own.tokens, own.fresh) == ("gisp", 3, 192, False)
    assert (slow.config.method, slow.config.num_steps, slow.tokens, slow.fresh) == ("wanda-sp", 7, 32, True)
    assert setup.settings(Cell("model", "slow", "mixture", 0))["changes"]["num_steps"] == 7
    assert setup.settings(Cell("model", "gisp", "mixture", 0))["changes"] == {}


@pytest.mark.slow
def test_fresh_steps_see_the_next_part_each() -> None:
    setup = comparison(
        methods=["parts"],
        variants={"parts": {"method": "wanda-sp", "num_steps": 2, "tokens": 48, "fresh": True}},
        calibrations={"news": "news"},
        seeds=[0],
    )
    compare.compare(setup, Path("out"), run=Runs(setup))
    cell = read_cell(Path("out/model/parts-news-seed0.json"))
    assert cell["calibration"]["tokens"] == cell["tokens_used"] == 96 and cell["steps"] == 2
    assert "parts: method wanda-sp, num_steps 2, tokens 48, fresh True." in Path("out/results.md").read_text()


@pytest.mark.slow
def test_a_restored_variant_is_better_than_the_same_order_unrestored() -> None:
    setup = comparison(
        methods=["wanda-sp", "wanda-restored"],
        variants={"wanda-restored": {"method": "wanda-sp", "restore": 2048}},
        calibrations={"news": "news"},
        seeds=[0],
        levels=[0.3],
    )
    compare.compare(setup, Path("out"), run=Runs(setup))
    plain, restored = (read_cell(Path(f"out/model/wanda-{n}-news-seed0.json")) for n in ("sp", "restored"))
    assert plain["levels"][0]["removed"] == restored["levels"][0]["removed"]
    assert plain["levels"][0]["perplexity"] != restored["levels"][0]["perplexity"]


def test_leading_methods_have_all_seeds_on_the_first_set() -> None:
    setup = comparison(leading=["gisp"], methods=["gisp", "wanda-sp", "random"], seeds=[0, 1, 2])
    names = [(cell.method, cell.calibration, cell.seed) for cell in setup.cells()]
    assert names == [
        *[("dense", None, None), ("random", None, None)],
        *[("gisp", "wikipedia", 0), ("wanda-sp", "wikipedia", 0), ("gisp", "mixture", 0), ("wanda-sp", "mixture", 0)],
        *[("gisp", "wikipedia", 1), ("gisp", "wikipedia", 2)],
    ]


def test_options_run_on_the_first_set_alone() -> None:
    setup = comparison(leading=["wanda-sp"], methods=["gisp", "wanda-sp"], once=["wanda-sp"])
    names = [(cell.method, cell.calibration, cell.seed) for cell in setup.cells()[1:]]
    expected = [("gisp", "wikipedia", 0), ("wanda-sp", "wikipedia", 0), ("gisp", "mixture", 0)]
    assert names == [*expected, ("wanda-sp", "wikipedia", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"missing \[\], unknown \['epochs'\]"),
        ({"methods": ["wandb"]}, "method must be one of gisp, .*got 'wandb'"),
        ({"levels": [0.2, 20]}, r"sparsity levels must lie in \(0, 1\), got 20"),
        ({"seeds": [-1]}, "seeds must be whole numbers of at least 0, got -1"),
        ({"seeds": []}, "seeds is empty: give at least one"),
        ({"leading": ["wandb"]}, "method must be one of gisp, .*got 'wandb'"),
        ({"once": ["wandb"]}, "method must be one of gisp, .*got 'wandb'"),
        ({"leading": "gisp"}, r"leading must be a list, got 'gisp'; write \[gisp\]"),
        ({"restore": -1}, "restore must be a number of tokens, or 0 for none, got -1"),
        ({"fresh": 1}, "fresh must be true or false, got 1"),
        ({"questions": 0}, "questions must be a whole number of at least 1, got 0"),
        ({"variants": ["a"]}, r"variants must map names to settings, got \['a'\]"),
        ({"methods": ["a"], "variants": {"a": {"score_momentum": 1}}}, r"score_momentum must be a number in \[0, 1\)"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        ({"evaluation_tokens": 1000}, "evaluation_tokens must be a multiple of 256, got 1000"),
        ({"tokens": 100}, r"gisp: tokens \(100\) must be a multiple of block_size \(16\)"),
        ({"window": 100}, "window must divide 256, the length of connected text, got 100"),
        ({"methods": "gisp"}, r"methods must be a list, got 'gisp'; write \[gisp\]"),
        ({"calibrations": ["news"]}, r"calibrations must map names to domains, got \['news'\]"),
        ({"calibrations": {"law": "law"}}, "calibrations.law: 'law' is no domain: use wikipedia, news, code"),
        ({"calibrations": {"mixture": "news:0.5,code:0.4"}}, "must add up to 1"),
        ({"models": ["a/b", "a-b"]}, "several cells have the file a-b/dense.json"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(**changes)


def test_an_unknown_calibration_set_is_named() -> None:
    with pytest.raises(ValueError, match="has no calibration set 'law': choose from wikipedia, mixture"):
        main([str(config()), "--calibrations", "law", "--dtype", "float32"])


@pytest.mark.slow
def test_compensation_is_part_of_what_is_measured() -> None:
    setup = comparison(methods=["flap", "flap-compensated"], seeds=[0])
    for method in setup.methods:
        run_cell(Cell("model", method, "mixture", 0), setup, Path("out"))
    plain, compensated = (read_cell(path) for path in sorted(Path("out/model").glob("flap*.json"), reverse=True))
    assert compensated["settings"]["method"] == "flap-compensated" and plain["settings"]["method"] == "flap"
    for one, other in zip(plain["levels"], compensated["levels"]):
        assert one["removed"] == other["removed"]
        assert other["parameters"] - one["parameters"] == 2 * 6 * 32  # a bias of o_proj and down_proj in every layer
        assert one["perplexity"] != other["perplexity"]


# ---- files, tables and plots -----------------------------------------------------------------------------------------


def test_tables_and_plots_come_from_the_files_alone(here, monkeypatch) -> None:
    for method, seed, factor in [("dense", None, 1), ("gisp", 0, 2), ("gisp", 1, 4), ("magnitude", 0, 2.5)]:
        name = "dense" if seed is None else f"{method}-{seed}"
        compare_results.write_cell(Path(f"out/model/{name}.json"), result(method=method, seed=seed, factor=factor))
    report = write_report(Path("out"))
    assert (here / "out" / "results.md").read_text() == report
    assert (here / "out" / "model-mixture.png").stat().st_size > 10_000 and "(model-mixture.png)" in report
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    assert rows[0][:4] == ["sparsity", "method", "calibrated on", "geometric mean"]
    assert rows[2] == ["0%", "dense", "-", "20.00", "10.00", "20.00", "40.00", "0.500", "1,000 (x1.00)", "1"]
    assert [row[:3] for row in rows[3:7]] == [
        ["20%", "magnitude", "mixture"],  # the best first
        ["20%", "gisp", "mixture"],
        ["40%", "magnitude", "mixture"],
        ["40%", "gisp", "mixture"],
    ]
    means = [(40 * 40 * 80) ** (1 / 3), (60 * 80 * 160) ** (1 / 3)]
    assert rows[4][3] == f"{statistics.fmean(means):.2f} ± {statistics.stdev(means):.2f}"
    assert rows[4][4:] == ["50.00 ± 14.14", "60.00 ± 28.28", "120.00 ± 56.57", "0.500", "3,000 (x3.00)", "2"]
    assert rows[-2:] == [
        ["gisp", "3", "576", "2", "1", "1,000", "2"],
        ["magnitude", "3", "576", "2", "1", "1,000", "1"],
    ]
    assert "Mean ± standard deviation over seeds." in report
    assert "Calibration set mixture: wikipedia:1/3,news:1/3,code:1/3." in report


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/results.md")), ids=lambda p: p.name)
def test_committed_tables_are_those_of_their_files(here, folder) -> None:
    shutil.copytree(folder, here / "copy")
    assert write_report(here / "copy") == (folder / "results.md").read_text(encoding="utf-8")
    table = compare_results.perplexity_table(read_cells(folder))
    assert table in (RESULTS.parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def test_a_perplexity_that_overflowed_is_shown_as_none() -> None:
    broken = result(method="random")
    broken["levels"][1]["perplexity"]["news"] = broken["levels"][1]["geometric_mean"] = None
    compare_results.write_cell(Path("out/random.json"), broken)
    (row,) = [line for line in write_report(Path("out")).splitlines() if "| random" in line and "40%" in line]
    assert [cell.strip() for cell in row.split("|")][4:7] == ["-", "50.00", "-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=1), "format must be 2, got 1"),
        (lambda r: r.pop("seconds"), r"missing \['seconds'\]"),
        (lambda r: r["settings"].update(extra=1), r"unknown \['extra'\]"),
        (lambda r: r["settings"].update(seed=None), "settings.seed must be a whole number"),
        (lambda r: r["levels"].pop(), r"levels must be \[0.2, 0.4\], got \[0.2\]"),
        (lambda r: r["levels"][0]["perplexity"].pop("news"), r"perplexity must have the keys .*missing \['news'\]"),
        (lambda r: r["levels"][0]["perplexity"].update(news=0.5), "perplexity.news must be a number"),
        (lambda r: r["levels"][0].update(geometric_mean=21.0), "geometric_mean must be .*, that of the perplexities"),
        (lambda r: r["levels"][0].update(accuracy=50), "accuracy must be a number"),
        (lambda r: r["levels"][0].update(prefill_ratio=-1), "prefill_ratio must be a number"),
        (lambda r: r["settings"].update(calibration=None), "calibration, data and seed must be null together"),
        (lambda r: r.update(peak_memory=-1), "peak_memory must be a whole number"),
    ],
)
def test_a_file_that_is_no_result_is_refused_and_named(change, message) -> None:
    broken = result()
    change(broken)
    path = Path("out/model/gisp-mixture-seed0.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=f"{path} is no result of a comparison: .*{message}.*; delete it"):
        read_cell(path)
    with pytest.raises(ValueError, match=message):
        compare.compare(comparison(methods=["gisp"]), Path("out"), run=Runs(comparison()))


def test_files_of_two_comparisons_make_no_table() -> None:
    other = result(method="magnitude")
    other["settings"]["tokens"] = 384
    compare_results.write_cell(Path("out/a.json"), result())
    compare_results.write_cell(Path("out/b.json"), other)
    with pytest.raises(ValueError, match="out/a.json and out/b.json differ in tokens: 192 and 384; delete the old"):
        read_cells(Path("out"))
    other["settings"] |= {"tokens": 192, "data": "news"}
    compare_results.write_cell(Path("out/b.json"), other)
    with pytest.raises(ValueError, match="out/a.json and out/b.json mean different data by 'mixture'"):
        read_cells(Path("out"))
    with pytest.raises(ValueError, match="empty holds no results: run python -m recipes.compare first"):
        read_cells(Path("empty"))
