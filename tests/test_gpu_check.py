import json

import pytest
import torch

from recipes import gpu_check


@pytest.mark.slow
def test_a_check_runs_in_a_process_of_its_own_and_is_written_down(tmp_path) -> None:
    output = tmp_path / "check.json"
    argv = ["--tiny", "--output", str(output), "--limit", "600", "--only", "fsdp2", "13b"]
    report = gpu_check.main(argv)
    checks = json.loads(output.read_text())["checks"]
    assert checks == report["checks"]
    assert checks["13b"]["status"] == "ran" and checks["13b"]["numbers"]["seconds"] > 0, checks
    if not torch.cuda.is_available():
        assert checks["fsdp2"]["reason"] == "no CUDA GPU", checks
    lines = output.with_suffix(".md").read_text()
    assert all(f"- {name}:" in lines for name in checks)


def test_speed_on_a_small_shape() -> None:
    found = gpu_check.check_speed(True)
    assert list(found) == ["0.2", "0.5"] and all(numbers["prefill_ratio"] > 0 for numbers in found.values())


def test_4_bit_checks_on_a_small_shape() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    found = gpu_check.check_4bit(True)
    # Ranks of 128 channels that have nothing to do with each other correlate by less than 0.3 (0.09 is one deviation).
    assert 0.3 < found["rank_correlation"][0] <= found["rank_correlation"][1] < 1
    large = gpu_check.check_70b_4bit(True)
    assert large["parameters"] == found["nf4"]["parameters"]  # both of the same shape here
    assert large["weights_gb"] < found["bfloat16"]["weights_gb"]


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
