"""The house rule on imports: they point down. A module imports only from those that stand before it in `ORDER`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gisp_hf"

# From the ground up: the way that the data take. Rooms, and the modules that stand between them.
ORDER = [
    *("version", "atomic", "deprecated", "untrusted", "upstream"),
    *("report.plots", "report.tables"),  # plain rows in, a picture or a text out
    "data.records",
    "losses",
    "models.fingerprint",
    "data",
    "models",
    "criteria",
    *("pruning.schedule", "pruning.methods", "config", "pruning"),
    "training",
    # the re-fit itself reads single tensors of a checkpoint; levels are built with it
    *("levels.files", "levels.weights", "recovery.grams", "recovery.hidden", "recovery.config", "recovery.record"),
    "recovery.lora_record",
    *("recovery.batches", "recovery.layers", "recovery.fit", "recovery.restore"),
    "levels",
    "recovery",
    "evaluation",
    "export",
    # a push writes the report beside the card
    *("hub.cards", "report.samples", "report.facts", "report.curves", "report.html"),
    "hub",
    "report",
    "pruner",
    "cli",
]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place(module: str) -> int:
    """The position of a module (``pruning.engine``) in `ORDER`: its own, or that of its room."""
    fitting = [name for name in ORDER if module == name or module.startswith(f"{name}.")]
    assert fitting, f"give {module} its place in ORDER"
    return ORDER.index(max(fitting, key=len))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, as ``pruning.engine``; those under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gisp_hf":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                is_module = (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").is_file()
                is_room = (PACKAGE.parent / name.replace(".", "/") / "__init__.py").is_file()
                found.add((name if is_module or is_room else node.module).removeprefix("gisp_hf").lstrip("."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("gisp_hf.") for alias in node.names if alias.name.startswith("gisp_hf.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = name_of(path)
    for name in imported(path):
        assert place(name) <= place(here), f"{here} must not import {name}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name_of(path): imported(path) for path in modules() if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way, name))}"
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_callback_knows_when_alone() -> None:
    names = imported(PACKAGE / "training" / "callback.py")
    assert not [name for name in names if name.split(".")[0] in ("criteria", "levels", "evaluation", "hub", "report")]


def test_maths_stays_free_of_hugging_face() -> None:
    for name in (
        "models/gates",
        "models/layout",
        "models/fingerprint",
        "models/elastic_sizes",
        "criteria/base",
        "criteria/taylor",
        "criteria/magnitude",
        "criteria/random",
        "criteria/activations",
        "criteria/block_influence",
        "criteria/flap",
        "criteria/gate",
        "criteria/refit",
        "criteria/wanda",
        "pruning/methods",
        "pruning/normalization",
        "pruning/schedule",
        "pruning/selection",
        "pruning/uniform",
        "recovery/batches",
        "recovery/config",
        "recovery/grams",
        "recovery/hidden",
        "recovery/lora_record",
        "recovery/record",
        "losses/objectives",
        "losses/chunked",
        "losses/distillation",
    ):
        path = PACKAGE / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tops = {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        tops |= {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not tops & {"transformers", "accelerate", "datasets", "peft", "huggingface_hub"}, name


TRANSFORMERS = {"huggingface_hub", "transformers"}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("elastic_sizes", {"collections", "math"}),
        ("modeling_gisp", TRANSFORMERS),
        # travelling files of its own, and the reader of weights that transformers stands on
        (
            "modeling_elastic",
            TRANSFORMERS
            | {"elastic_sizes", "modeling_gisp", "bisect", "collections", "contextlib", "copy", "safetensors"},
        ),
    ],
)
def test_the_remote_file_reaches_nothing_but_transformers(name: str, others: set[str]) -> None:
    tree = ast.parse((PACKAGE / "models" / f"{name}.py").read_text(encoding="utf-8"))
    tops = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            tops.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
    assert tops == {"typing", "torch"} | others
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
