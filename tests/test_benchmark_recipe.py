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
        "--repeats",
        "2",
        "--checkpointing",
        "--activation-blocks",
        "7",
    ]
    summary = benchmark_pruning.compare(benchmark_pruning.parse(argv), argv)
    assert summary["same_order"] and summary["removed"] > 50 and summary["removed_differently"] == 0
    assert summary["time_ratio"] > 0 and summary["memory_ratio"] > 0 and summary["resident_ratio"] > 0
    assert all(row["peak"] > 0 for row in summary["rows"]) and all(row["resident"] > 0 for row in summary["rows"])
    assert [row["writing"] > 0 for row in summary["rows"]] == [False, True, True]
    activation = summary["activation"]
    assert (activation["tokens"], summary["tokens"]) == (7 * 16, 8 * 16)
    assert activation["memory_ratio"] > 0 and 0 < activation["shared"] <= min(activation["removed"], summary["removed"])
    printed = capsys.readouterr().out
    assert printed.count("of the masked run") == 2 and "x the weights" in printed
    assert printed.count("running masked, ") == 2
