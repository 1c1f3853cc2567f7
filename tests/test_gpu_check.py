import importlib.util
import json

import pytest
import torch

from recipes import gpu_check


@pytest.mark.slow
def test_checks_run_on_small_shapes_and_skip_by_name(tmp_path) -> None:
    output = tmp_path / "check.json"
    report = gpu_check.main(["--tiny", "--output", str(output), "--only", "fsdp2", "speed", "4bit", "13b", "70b-4bit"])
    checks = json.loads(output.read_text())["checks"]
    assert checks == report["checks"]
    assert checks["speed"]["status"] == checks["13b"]["status"] == "ran", checks
    assert checks["speed"]["numbers"]["0.5"]["prefill_ratio"] > 0
    if not torch.cuda.is_available():
        assert checks["fsdp2"] == {"status": "skipped", "reason": "no CUDA GPU", "wall_s": checks["fsdp2"]["wall_s"]}
    if importlib.util.find_spec("bitsandbytes") is None:
        assert checks["4bit"]["reason"] == checks["70b-4bit"]["reason"] == "bitsandbytes is not installed"
    else:
        assert checks["4bit"]["numbers"]["rank_correlation"][0] > 0.5, checks
        assert checks["70b-4bit"]["status"] == "ran", checks
    lines = output.with_suffix(".md").read_text()
    assert all(f"- {name}:" in lines for name in checks)


def test_a_machine_without_a_gpu_skips_everything(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, (check, _) in gpu_check.CHECKS.items():
        with pytest.raises(gpu_check.Skip, match="no CUDA GPU|bitsandbytes is not installed"):
            check(False)
        assert name in gpu_check.line_of(name, {"status": "skipped", "reason": "no CUDA GPU"})


def test_time_that_is_over_is_named() -> None:
    found = gpu_check.run_checks(["speed", "13b"], tiny=True, limit=0)
    assert {entry["reason"] for entry in found.values()} == {"the 0 seconds for all checks are over"}


@pytest.mark.slow
def test_the_small_run_of_the_fsdp2_check_prunes(tmp_path) -> None:
    from recipes import prune

    pruner = prune.main([*gpu_check._small_run(tmp_path), "--output_dir", str(tmp_path / "plain"), "--use_cpu", "true"])
    assert len(pruner.trajectory) > 0 and (tmp_path / "plain" / "levels" / "sparsity-0.30").is_dir()
