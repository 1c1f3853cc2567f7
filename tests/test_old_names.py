"""Names of version 0.1 work for one more version, with a warning that tells the new one."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import gisp_hf
from gisp_hf import GISPConfig, GISPPruner, Trajectory
from gisp_hf.deprecated import MODULES
from tests.runs import prune, tiny_config
from tests.tiny import tiny_model

# What README and recipes of version 0.1 imported, and the main functions of each module.
NAMES = {
    "accuracy": ("multiple_choice_accuracy", "exact_match"),
    "architectures": ("FAMILIES", "discover", "family_of"),
    "calibration": ("load_calibration", "Calibration", "encode_completion", "CandidateCollator"),
    "callback": ("GISPPruner",),
    "cards": ("main_card", "level_card", "check_card"),
    "checkpoint": ("save_level", "check_output_folder"),
    "chunked": ("ChunkedLoss",),
    "distributed": ("local_rows", "check_agreement", "DivergenceError", "model_fingerprint"),
    "engine": ("Engine", "NonFiniteGradientError"),
    "fingerprint": ("fingerprint",),
    "harness": ("evaluate_suite", "CMQA_TASKS"),
    "level_evaluation": ("evaluate_levels", "measure"),
    "materialize": ("load_level", "materialize", "load_trajectory"),
    "modeling_gisp": ("GispLlamaForCausalLM",),
    "objectives": ("language_modeling_loss", "margin_loss", "completion_losses", "decode_weights"),
    "schedule": ("target_sparsity", "targets_of_step"),
    "scoring": ("normalizer",),
    "selection": ("select", "check_reachable"),
    "structures": ("Block", "Layout", "Member"),
    "surgery": ("zero_structures", "as_pruned_model"),
    "tasks": ("SOURCES", "find_sources", "Candidate"),
    "trajectory": ("Trajectory", "Base", "Step"),
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_an_old_module_gives_the_objects_of_the_new_ones(module) -> None:
    sys.modules.pop(f"gisp_hf.{module}", None)
    with pytest.warns(FutureWarning, match=f"gisp_hf.{module} is now gisp_hf.{MODULES[module][0]}"):
        old = importlib.import_module(f"gisp_hf.{module}")
    new = [importlib.import_module(f"gisp_hf.{name}") for name in MODULES[module]]
    for name in NAMES[module]:
        found = getattr(old, name)
        assert any(getattr(room, name, None) is found for room in new), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing


@pytest.mark.parametrize(
    "line",
    [
        "from gisp_hf.evaluation import perplexity, measure_speed, evaluation_mode; perplexity.__call__",
        "from gisp_hf.hub import push_levels, read_levels, LevelInfo, PushError, LevelUploader, write_metrics",
        "from gisp_hf.report import format_table, plot_perplexity, plot_removed, plot_loss",
        "from gisp_hf import GISPConfig, GISPPruner, Trajectory, __version__",
    ],
)
def test_rooms_that_kept_their_name_kept_their_functions(line) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(line)


@pytest.mark.slow
def test_the_imports_of_an_old_script_work_in_a_fresh_process() -> None:
    code = (
        "from gisp_hf.calibration import load_calibration\n"
        "from gisp_hf.objectives import completion_losses, decode_weights\n"
        "from gisp_hf.materialize import load_level\n"
        "import gisp_hf; assert load_level is gisp_hf.load_level"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "gisp_hf.calibration is now gisp_hf.data.calibration and gisp_hf.data.encoding" in run.stderr


def test_old_minima_go_into_minimum_kept() -> None:
    with pytest.warns(FutureWarning, match=r"GISPConfig\(min_channels=\) is now GISPConfig\(minimum_kept=\)"):
        config = GISPConfig(min_groups=2, min_channels=8)
    assert config == GISPConfig(minimum_kept={"attention": 2, "mlp": 8})
    with pytest.warns(FutureWarning, match=r"GISPConfig.min_groups is now GISPConfig.minimum_kept\['attention'\]"):
        assert config.min_groups == 2
    with pytest.warns(FutureWarning):
        assert GISPConfig.from_dict({"min_channels": 3}).minimum_of("mlp") == 3


def test_layer_groups_are_layer_passes(tmp_path) -> None:
    with pytest.warns(FutureWarning, match=r"GISPPruner\(layer_groups=\) is now GISPPruner\(layer_passes=\)"):
        pruner = GISPPruner(tiny_config(), tmp_path, layer_groups=2)
    assert pruner.layer_passes == 2


def test_ranks_are_the_order(tmp_path) -> None:
    trajectory = prune(tiny_model(), tmp_path).trajectory
    with pytest.warns(FutureWarning, match=r"Trajectory.ranks is now Trajectory.order"):
        assert all(torch.equal(a, b) for a, b in zip(trajectory.ranks, trajectory.order))
    with pytest.warns(FutureWarning, match=r"Trajectory\(ranks=\) is now Trajectory\(order=\)"):
        again = Trajectory(
            layout=trajectory.layout, ranks=trajectory.order, config=trajectory.config, base=trajectory.base
        )
    assert again.digest() == trajectory.digest()


def test_the_public_face_is_the_documented_one() -> None:
    classes = {"GISPConfig", "GISPPruner", "RestoreConfig", "Trajectory"}
    functions = {"load_level", "prune", "restore", "restore_level", "scoring_only"}
    assert set(gisp_hf.__all__) == {*classes, *functions, "__version__"}
