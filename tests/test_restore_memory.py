"""Restoration of a saved level holds one layer at a time, whatever the size of the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gisp_hf.levels.materialize import materialize
from tests.test_materialize import random_trajectory, save_base
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer

MEASURE = """
import sys
from pathlib import Path
from gisp_hf import RestoreConfig, restore_level

small, large, text, out = sys.argv[1:]
config = RestoreConfig(data=text, tokens=512, batch_size=2)
restore_level(small, Path(out) / "small", sparsity=0.3, config=config)  # imports and lazy tables, before measuring
def status(key):  # not ru_maxrss: a child of pytest inherits the peak of pytest itself
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

before = status("VmRSS")
restore_level(large, Path(out) / "large", sparsity=0.3, config=config)
print(status("VmHWM") - before)
"""


def save_run(folder: Path, **sizes: int) -> tuple[Path, int]:
    """A run with one level; bytes of the unpruned model."""
    model = tiny_model("llama", **sizes)
    base = save_base(model, folder / "base")
    run = folder / "run"
    random_trajectory(model, base).save(run)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    del model
    materialize(run, run / "sparsity-0.30", sparsity=0.3)
    return run, size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_peak_memory_is_a_fraction_of_the_model(tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("\n\n".join(tiny_tokenizer().decode(block["input_ids"]) for block in tiny_blocks(200, 32)))
    small, _ = save_run(tmp_path / "a")
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 60, "vocab_size": 256}
    large, size = save_run(tmp_path / "b", **sizes, head_dim=48)
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(text), str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    # Freed tensors go back to the system at once, so that the allocator's own habits are not measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"unpruned {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert size > 300e6 and (tmp_path / "large" / "restoration.json").is_file()
    assert peak < size / 3
