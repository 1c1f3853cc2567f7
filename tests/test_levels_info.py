"""Which levels there are, and their metrics: any real number goes in, null where it is not finite."""

import json
import logging
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gisp_hf.cli.main import main
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.levels.info import (
    LevelInfo,
    check_metrics,
    clean_metrics,
    find_run,
    levels_json,
    read_levels,
    write_metrics,
)
from gisp_hf.levels.materialize import materialize
from gisp_hf.pruning.trajectory import Trajectory
from tests.test_materialize import random_trajectory, save_base
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info")
    model = tiny_model()
    random_trajectory(model, save_base(model, folder / "base")).save(folder / "run")
    materialize(folder / "run", folder / "run" / "sparsity-0.20", sparsity=0.2)
    return folder / "run"


@pytest.fixture
def level(run: Path) -> Path:
    (run / "sparsity-0.20" / "metrics.json").unlink(missing_ok=True)
    return run / "sparsity-0.20"


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (7, 7),
        (Fraction(1, 2), 0.5),
        (np.float32(1.5), 1.5),
        (np.float64(1.5), 1.5),
        (np.float16(1.5), 1.5),
        (np.int64(7), 7),
        (np.array(1.5), 1.5),
        (torch.tensor(1.5), 1.5),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(7), 7),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (None, None),
    ],
)
def test_any_real_number(value: Any, expected: float | None) -> None:
    found = clean_metrics("sparsity-0.20", {"perplexity": value})
    assert found == {"perplexity": expected} and type(found["perplexity"]) is type(expected)


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        float("nan"),
        -np.inf,
        np.float32("nan"),
        torch.tensor(torch.inf),
        np.array(np.nan),
        pytest.param(10**5000, id="10**5000"),
    ],
)
def test_what_is_not_finite_is_null_with_a_warning(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert clean_metrics("sparsity-0.20", {"perplexity": value, "accuracy": 1.0}) == {
            "perplexity": None,
            "accuracy": 1.0,
        }
    (record,) = caplog.records
    assert record.getMessage().startswith("sparsity-0.20: perplexity is ")
    assert (
        record.getMessage().endswith("which is not finite; it is recorded as null") and len(record.getMessage()) < 200
    )


@pytest.mark.parametrize(
    "value",
    [
        True,
        "12.3",
        1j,
        [1.0],
        torch.tensor([1.0]),
        torch.tensor(True),
        np.bool_(True),
        np.ones(2),
        Decimal(1),
    ],
)
def test_what_is_no_real_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"sparsity-0.20: perplexity is .*, of type \w+; give one real number"):
        clean_metrics("sparsity-0.20", {"perplexity": value})


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b", "x" * 65, 5, "-a", "\u00e4"])
def test_names_are_short_and_plain(name: Any) -> None:
    for check in (clean_metrics, check_metrics):
        with pytest.raises(ValueError, match="has a metric named .*; use up to 64 letters"):
            check("sparsity-0.20", {name: 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", 10**400, np.float32(1)])
def test_only_plain_numbers_stand_in_files(value: Any) -> None:
    check_metrics("sparsity-0.20", {"a": 1.0, "b": 2, "c": None})
    with pytest.raises(ValueError, match="give a finite number"):
        check_metrics("sparsity-0.20", {"a": value})


# ---- files -----------------------------------------------------------------------------------------------------------


def test_metrics_are_added_to_those_that_are_there(run: Path, level: Path) -> None:
    write_metrics(level, {"perplexity": 12.5, "accuracy": np.float32(0.5)})
    write_metrics(level, {"perplexity": float("inf")})
    assert json.loads((level / "metrics.json").read_text()) == {"accuracy": 0.5, "perplexity": None}
    assert read_levels(run)[0].metrics == {"accuracy": 0.5, "perplexity": None}
    assert not [path.name for path in level.iterdir() if path.name.endswith(".tmp")]


def test_metrics_of_the_version_before_are_read(run: Path, level: Path) -> None:
    (level / "metrics.json").write_text('{\n "accuracy": 1,\n "perplexity_128": 17.25\n}\n')
    assert read_levels(run)[0].metrics == {"accuracy": 1, "perplexity_128": 17.25}


def test_a_refused_metric_changes_nothing(level: Path) -> None:
    write_metrics(level, {"perplexity": 12.5})
    before = (level / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="give one real number"):
        write_metrics(level, {"accuracy": 1.0, "perplexity": "low"})
    assert (level / "metrics.json").read_bytes() == before


def test_null_in_levels_json() -> None:
    info = LevelInfo("sparsity-0.20", 0.2, 5, 4, commit="a" * 40, metrics={"perplexity": None, "accuracy": 0.5})
    metrics = json.loads(levels_json([info]))["levels"]["sparsity-0.20"]["metrics"]
    assert metrics == {"perplexity": None, "accuracy": 0.5}


def test_null_is_shown_as_a_dash(run: Path, level: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(level, {"accuracy": 0.5, "perplexity": float("nan")})
    assert main(["levels", str(run)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")][-2:] == ["0.50", "-"]


def test_null_on_cards(run: Path, level: Path) -> None:
    write_metrics(level, {"accuracy": 0.5, "perplexity": float("nan")})
    trajectory, levels = Trajectory.load(run), read_levels(run)
    assert "| `sparsity-0.20` | 0.5 | - |" in level_card(trajectory, levels[0], repo_id="me/x")
    assert "| 0.5 | - |" in main_card(trajectory, levels, repo_id="me/x")


# ---- where a run is --------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    (folder / "sparsity-0.20").mkdir(parents=True)
    return folder


def test_a_run_is_found_where_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "iterative")
    make_run(run / "inner")  # not looked at: the folder itself holds levels
    assert find_run(run) == run
    assert find_run(tmp_path / "runs") == run


def test_a_folder_without_a_run_stays_as_it_is(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "iterative")
    assert find_run(tmp_path) == tmp_path  # two folders down is too deep
    assert find_run(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_a_trajectory_alone_is_a_run(tmp_path: Path) -> None:
    """What ``materialize`` cuts from needs no level."""
    (tmp_path / "trajectory.json").write_text("{}")
    make_run(tmp_path / "iterative")
    assert find_run(tmp_path) == tmp_path


def test_names_like_levels_do_not_count(tmp_path: Path) -> None:
    for name in ("sparsity-2", "sparsity-0.2", "sparsity-0.20.tmp", "notes"):
        (tmp_path / "other" / name).mkdir(parents=True)
    assert find_run(tmp_path) == tmp_path


def test_several_runs_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "iterative")
    make_run(tmp_path / "one-shot")
    with pytest.raises(ValueError, match=r"holds several runs: iterative, one-shot; give one of them, such as .*iter"):
        find_run(tmp_path)
