"""Names of version 0.1: they work for one more version, with a warning that tells the new one."""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

# old module -> the modules that its names are in now
MODULES: dict[str, tuple[str, ...]] = {
    "accuracy": ("evaluation.choices", "evaluation.answers"),
    "architectures": ("models.discovery", "models.families"),
    "calibration": ("data.calibration", "data.encoding"),
    "callback": ("pruner", "training.callback"),
    "cards": ("hub.cards",),
    "checkpoint": ("levels.save",),
    "chunked": ("losses.chunked",),
    "distributed": ("models.shards", "training.distributed"),
    "engine": ("pruning.engine",),
    "fingerprint": ("models.fingerprint",),
    "harness": ("evaluation.suites",),
    "level_evaluation": ("evaluation.levels",),
    "materialize": ("levels.materialize",),
    "modeling_gisp": ("models.modeling_gisp",),
    "objectives": ("losses.objectives",),
    "schedule": ("pruning.schedule",),
    "scoring": ("criteria.taylor", "pruning.normalization"),
    "selection": ("pruning.selection",),
    "structures": ("models.layout",),
    "surgery": ("models.surgery",),
    "tasks": ("data.sources", "data.files", "data.records", "data.calibration"),
    "trajectory": ("pruning.trajectory",),
}


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes in the next version", FutureWarning, stacklevel=stacklevel)


def accept_old_arguments(names: dict[str, str], convert: Callable[[str, Any, Any], Any] | None = None) -> Any:
    """A class decorator: the constructor takes old keyword arguments under their new names.

    Args:
        names: old -> new.
        convert: (old name, its value, value given under the new name or None) -> value of the new argument; the old
            value if None.
    """

    def decorate(cls: C) -> C:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def accepting(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                value = kwargs.pop(old)
                warn_renamed(f"{cls.__name__}({old}=)", f"{cls.__name__}({new}=)")
                kwargs[new] = value if convert is None else convert(old, value, kwargs.get(new))
            init(self, *args, **kwargs)

        cls.__init__ = accepting  # type: ignore[misc]
        return cls

    return decorate


class _OldModule(types.ModuleType):
    """A module of version 0.1, whose names are found where they are now."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.rpartition(".")
        if not name.startswith("__"):
            for new in MODULES[old]:
                found = getattr(importlib.import_module(f"{package}.{new}"), name, None)
                if found is not None:
                    return found
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "gisp_hf" or name not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        new = " and ".join(f"gisp_hf.{name}" for name in MODULES[module.__name__.partition(".")[2]])
        warn_renamed(module.__name__, new, stacklevel=6)


def install() -> None:
    """Lets ``import gisp_hf.calibration`` and the like go on to work. Comes after the finders of real modules."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
