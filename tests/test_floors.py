"""The house rule on imports: a module imports only from floors below its own, or from its own package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gisp_hf"

# From the ground up: a module may import those that stand before it, and no other.
ORDER = [
    "version",
    "data",
    "losses",
    "models",
    "criteria",
    "config",
    "pruning",
    "training",
    "levels",
    "evaluation",
    "hub",
    "report",
    "cli",
]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gisp_hf":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gisp_hf.")}
    return rooms - {room(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in ORDER, f"give {room(path)} its place in ORDER"
    for name in imported_rooms(path):
        assert ORDER.index(name) < ORDER.index(room(path)), f"{room(path)} must not import {name}"


def test_maths_stays_free_of_hugging_face() -> None:
    for name in (
        "models/layout",
        "models/fingerprint",
        "criteria/taylor",
        "pruning/schedule",
        "pruning/selection",
        "losses/objectives",
        "losses/chunked",
    ):
        path = PACKAGE / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tops = {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        tops |= {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not tops & {"transformers", "accelerate", "datasets", "peft", "huggingface_hub"}, name


def test_the_remote_file_reaches_nothing_but_transformers() -> None:
    tree = ast.parse((PACKAGE / "models" / "modeling_gisp.py").read_text(encoding="utf-8"))
    tops = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            tops.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
    assert tops == {"typing", "huggingface_hub", "torch", "transformers"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "exec", "eval", "compile", "__import__"}


def test_no_pickle_and_no_unasked_remote_code() -> None:
    for path in [*modules(), *sorted(PACKAGE.parent.glob("recipes/*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in {"save", "load"}, path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or not node.value.value, path


def test_no_file_is_longer_than_the_house_allows() -> None:
    for path in modules():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
