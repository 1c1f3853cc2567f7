"""The wheel, installed by itself: every module, card template and metric of the checkout is in it and can be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "gisp_hf").rglob("*.py")
    if "metrics" not in path.parts
)
METRICS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gisp_hf").glob("evaluation/metrics/*/*.py"))
TEMPLATES = sorted(path.name for path in (ROOT / "model_cards").glob("*.md"))

IMPORT_ALL = """
import importlib, sys
from importlib.resources import files
from pathlib import Path
target, modules, metrics, templates = sys.argv[1], *(line.split(",") for line in sys.argv[2:])
import gisp_hf
assert Path(gisp_hf.__file__).is_relative_to(target), gisp_hf.__file__
for name in modules:
    assert Path(importlib.import_module(name).__file__).is_relative_to(target), name
import evaluate
for path in metrics:
    assert evaluate.load(str(Path(target, path))).features, path
for name in templates:
    assert len(files("gisp_hf.model_cards").joinpath(name).read_text(encoding="utf-8")) > 100, name
assert files("gisp_hf").joinpath("py.typed").is_file()
for name in ("page.html", "page.css", "page.js"):
    assert files("gisp_hf.report").joinpath("page", name).is_file(), name
print("imported", len(modules))
"""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # the checkout must not be found by its place or by PYTHONPATH
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path) -> None:
    source = tmp_path / "source"  # a copy: a build leaves folders beside setup.py
    source.mkdir()
    names = ["gisp_hf", "model_cards", "setup.py", "setup.cfg", "README.md", "LICENSE"]
    run("cp", "-r", *(str(ROOT / name) for name in names), str(source), folder=tmp_path)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", str(source)]
    run(*pip, *build, folder=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), folder=tmp_path)

    # -P: the folder of the script is not searched either; the heavy dependencies come from the outer environment
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n" + IMPORT_ALL
    lists = [",".join(names) for names in (MODULES, METRICS, TEMPLATES)]
    done = run(sys.executable, "-P", "-c", code, str(target), *lists, folder=tmp_path)
    assert f"imported {len(MODULES)}" in done.stdout and len(MODULES) > 30
    assert len(METRICS) >= 2 and len(TEMPLATES) >= 3
