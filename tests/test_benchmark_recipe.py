import pytest

from recipes import benchmark_pruning


@pytest.mark.slow
def test_masked_and_gisp_hf_remove_the_same(tmp_path, capsys) -> None:
    argv = [
        "--shape",
        "tiny",
        "--steps",
        "3",
        "--blocks",
        "8",
        "--batch-size",
        "8",
        "--block-length",
        "16",
        "--chunk-tokens",
        "32",
    ]
    summary = benchmark_pruning.compare(benchmark_pruning.parse(argv), argv)
    assert summary["same_order"] and summary["removed"] > 50 and summary["removed_differently"] == 0
    assert summary["time_ratio"] > 0 and summary["memory_ratio"] > 0
    activation = summary["activation"]
    assert activation["memory_ratio"] > 0 and 0 < activation["shared"] <= min(activation["removed"], summary["removed"])
    assert capsys.readouterr().out.count("of the masked run") == 2
