"""Results of a comparison: one JSON file a cell, checked when it is read; tables and plots from these files alone.

A cell is one model, pruned by one method on one calibration set with one seed; or the unpruned model, whose method is
``dense``. Format 2:

==================  ==========================================================================================
key                 value
==================  ==========================================================================================
settings            model, method, calibration (its name), data (its domains and shares), seed, changes (of a variant,
                    else empty), and all that the cells of one comparison have in common; calibration, data and seed are
                    null for ``dense`` and for a method that reads no data
environment         versions, device and threads
calibration         provenance of the calibration set (`gisp_hf.data.Calibration`), or null
steps, tokens_used  pruning steps, and tokens that the criterion saw in all of them together
seconds             of pruning, with writing the levels and without evaluation
cpu_seconds         of the same, summed over threads: other programs on the machine hardly change them
evaluation_seconds  of all levels together
peak_memory         bytes, of pruning: the largest resident size of the process (on a GPU: what torch allocated there)
levels              sparsity (asked for), removed (reached), parameters, perplexity by domain, geometric_mean of
                    these, accuracy (a fraction), prefill (tokens per second), prefill_ratio (to the unpruned model's in
                    the same process); a perplexity that is not finite is null, and the mean with it
==================  ==========================================================================================
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gisp_hf.atomic import write_text_atomic
from gisp_hf.report import format_table, plot_perplexity
from gisp_hf.untrusted import check_list, check_number, check_object, check_text, check_whole, read_json

FORMAT = 2
DENSE = "dense"
# What tells the cells of one comparison apart; all other settings must agree.
OWN_SETTINGS = ("model", "method", "calibration", "data", "seed", "changes")
COMMON_SETTINGS = (
    *("levels", "tokens", "block_size", "batch_size", "num_steps", "evaluation_tokens", "window", "questions"),
    *("fresh", "restore", "dtype", "text"),
)


def geometric_mean(perplexities: Mapping[str, float | None]) -> float | None:
    """None if one of them is."""
    values = [value for value in perplexities.values() if value is not None]
    return statistics.geometric_mean(values) if len(values) == len(perplexities) else None


def write_cell(path: Path, result: Mapping[str, Any]) -> None:
    """Checks a result and writes it, whole or not at all."""
    check_cell(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(result, indent=1) + "\n")


def read_cell(path: Path) -> dict[str, Any]:
    """A result, checked.

    Raises:
        ValueError: the file is not what this module's description says.
    """
    try:
        result = read_json(path)
        check_cell(result)
    except ValueError as error:
        raise ValueError(f"{path} is no result of a comparison: {error}; delete it, and its cell runs again") from error
    return result


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder and below it, in the order of their names.

    Raises:
        ValueError: a file is not a result, there is none, or two of them belong to different comparisons.
    """
    paths = sorted(folder.rglob("*.json"))
    cells = [read_cell(path) for path in paths]
    if not cells:
        raise ValueError(f"{folder} holds no results: run python -m recipes.compare first")
    data: dict[str, tuple[str, Path]] = {}  # name of a calibration set -> what it holds, and who says so
    for path, cell in zip(paths, cells, strict=True):
        settings, first = cell["settings"], cells[0]["settings"]
        for key in COMMON_SETTINGS:
            if settings[key] != first[key]:
                raise ValueError(
                    f"{paths[0]} and {path} differ in {key}: {first[key]!r} and {settings[key]!r}; delete the old "
                    "ones, or give each comparison its own --output-dir"
                )
        if settings["calibration"] is not None:
            known, where = data.setdefault(settings["calibration"], (settings["data"], path))
            if known != settings["data"]:
                raise ValueError(
                    f"{where} and {path} mean different data by {settings['calibration']!r}: {known!r} and "
                    f"{settings['data']!r}; delete the old ones, or choose another name"
                )
    return cells


def check_cell(result: Mapping[str, Any]) -> None:
    """Refuses what is not in the schema.

    Raises:
        ValueError: with the place and the value.
    """
    keys = {
        *("format", "settings", "environment", "calibration", "steps", "tokens_used", "seconds"),
        *("cpu_seconds", "evaluation_seconds", "peak_memory", "levels"),
    }
    _check_keys(result, keys, "the result")
    if result["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {result['format']!r}")
    settings = check_object(result["settings"], "settings")
    _check_keys(settings, {*OWN_SETTINGS, *COMMON_SETTINGS}, "settings")
    for key in ("model", "method", "dtype"):
        check_text(settings[key], f"settings.{key}")
    dense = settings["method"] == DENSE
    if dense or settings["calibration"] is None:
        if any(settings[key] is not None for key in ("calibration", "data", "seed")):
            raise ValueError("settings.calibration, data and seed must be null together, and are for dense")
    else:
        check_text(settings["calibration"], "settings.calibration")
        check_text(settings["data"], "settings.data")
        check_whole(settings["seed"], "settings.seed")
        check_object(result["calibration"], "calibration")
    for key in ("tokens", "block_size", "batch_size", "num_steps", "evaluation_tokens", "window", "questions"):
        check_whole(settings[key], f"settings.{key}", least=1)
    if type(settings["fresh"]) is not bool:
        raise ValueError(f"settings.fresh must be true or false, got {settings['fresh']!r}")
    check_whole(settings["restore"], "settings.restore")
    check_object(settings["changes"], "settings.changes")
    text = check_object(settings["text"], "settings.text")
    check_object(result["environment"], "environment")
    for key in ("steps", "tokens_used", "peak_memory"):
        check_whole(result[key], key)
    for key in ("seconds", "cpu_seconds", "evaluation_seconds"):
        check_number(result[key], key, least=0)
    asked = check_list(settings["levels"], "settings.levels", longest=100)
    levels = check_list(result["levels"], "levels", longest=100)
    found = [_check_level(level, f"levels[{n}]", domains=set(text)) for n, level in enumerate(levels)]
    if found != ([0] if dense else asked):
        raise ValueError(f"levels must be {[0] if dense else asked}, got {found}")


def _check_level(value: Any, place: str, *, domains: set[str]) -> float:
    level = check_object(value, place)
    keys = {"sparsity", "removed", "parameters", "perplexity", "geometric_mean"}
    _check_keys(level, {*keys, "accuracy", "prefill", "prefill_ratio"}, place)
    if level["accuracy"] is not None:
        check_number(level["accuracy"], f"{place}.accuracy", least=0, most=1)
    for key in ("prefill", "prefill_ratio"):
        check_number(level[key], f"{place}.{key}", least=0)
    check_number(level["removed"], f"{place}.removed", least=0, most=1)
    check_whole(level["parameters"], f"{place}.parameters", least=1)
    perplexity = check_object(level["perplexity"], f"{place}.perplexity")
    _check_keys(perplexity, domains, f"{place}.perplexity")
    for domain, number in perplexity.items():
        if number is not None:
            check_number(number, f"{place}.perplexity.{domain}", least=1)
    mean, expected = level["geometric_mean"], geometric_mean(perplexity)
    if expected is None:
        if mean is not None:
            raise ValueError(f"{place}.geometric_mean must be null where a perplexity is, got {mean!r}")
    elif not math.isclose(check_number(mean, f"{place}.geometric_mean"), expected, rel_tol=1e-6):
        raise ValueError(f"{place}.geometric_mean must be {expected!r}, that of the perplexities, got {mean!r}")
    return check_number(level["sparsity"], f"{place}.sparsity", least=0, most=1)


def _check_keys(found: Mapping[str, Any], keys: set[str], place: str) -> None:
    if set(found) != keys:
        missing, unknown = sorted(keys - set(found)), sorted(set(found) - keys)
        raise ValueError(f"{place} must have the keys {sorted(keys)}: missing {missing}, unknown {unknown}")


# ---- tables and plots ------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> str:
    """Writes ``results.md`` and one plot for each model and calibration set, from the files in ``folder`` alone.

    Returns:
        The text of ``results.md``.

    Raises:
        ValueError: as `read_cells`.
        ImportError: matplotlib is not installed.
    """
    cells = read_cells(folder)
    parts = []
    for model in dict.fromkeys(cell["settings"]["model"] for cell in cells):
        own = [cell for cell in cells if cell["settings"]["model"] == model]
        parts += [f"## {model}", perplexity_table(own), cost_table(own)]
        for name in _data_of(own):
            picture = f"{slug(model)}-{slug(name)}.png"
            draw(own, name, folder / picture)
            parts.append(f"![{model}, calibrated on {name}]({picture})")
    text = "\n\n".join([describe(cells), *parts]) + "\n"
    write_text_atomic(folder / "results.md", text)
    return text


def describe(cells: Sequence[Mapping[str, Any]]) -> str:
    """The settings that all cells share, in words."""
    settings = cells[0]["settings"]
    lines = [
        f"Perplexity on {settings['evaluation_tokens']:,} held-out tokens of each domain, windows of "
        f"{settings['window']}; {settings['dtype']}. Rows are sorted by the geometric mean over the domains, which "
        "stands first.",
        f"Calibration: {settings['tokens']:,} tokens a step in blocks of {settings['block_size']}, the same for every "
        f"method, {'others' if settings['fresh'] else 'the same'} in each step; at most {settings['num_steps']} steps.",
        *(f"{name}: {written}." for name, written in _changes_of(cells).items()),
        *(f"Calibration set {name}: {meaning}." for name, meaning in _data_of(cells).items()),
        f"Accuracy: {settings['questions']} questions with four choices, how a held-out Wikipedia passage goes on. "
        "Prefill: tokens per second of one prompt, beside the unpruned model in the same process.",
        f"Text: {', '.join(f'{domain} from {source}' for domain, source in settings['text'].items())}.",
    ]
    if any(len(group) > 1 for group in _by_row(cells).values()):
        lines.append("Mean ± standard deviation over seeds.")
    return "\n".join(lines)


def perplexity_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """One row for each level, method and calibration set: level by level, the best first; dense on top."""
    domains = list(cells[0]["settings"]["text"])
    rows: list[dict[str, Any]] = []
    for (method, calibration), group in _by_row(cells).items():
        for number, level in enumerate(group[0]["levels"]):
            levels = [cell["levels"][number] for cell in group]
            mean = _mean([entry["geometric_mean"] for entry in levels])
            row = {
                "sparsity": f"{level['sparsity']:.0%}",
                "method": method,
                "calibration": calibration or "-",
                "seeds": len(group),
                "geometric_mean": _spread([entry["geometric_mean"] for entry in levels]),
                "order": (level["sparsity"], math.inf if mean is None else mean),
            }
            row |= {d: _spread([entry["perplexity"][d] for entry in levels]) for d in domains}
            accuracy = _mean([entry["accuracy"] for entry in levels])
            ratio = _mean([entry["prefill_ratio"] for entry in levels])
            row["accuracy"] = None if accuracy is None else f"{accuracy:.3f}"
            row["prefill"] = f"{_mean([entry['prefill'] for entry in levels]):,.0f} (x{ratio:.2f})"
            rows.append(row)
    columns = {
        **{"sparsity": "sparsity", "method": "method", "calibration": "calibrated on"},
        **{"geometric_mean": "geometric mean", **{domain: domain for domain in domains}, "accuracy": "accuracy"},
        **{"prefill": "prefill, tokens/s (x dense)", "seeds": "seeds"},
    }
    return format_table(sorted(rows, key=lambda row: row["order"]), columns)


def cost_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Steps, tokens, seconds and memory of each method, the mean over its cells."""
    rows = []
    for method in dict.fromkeys(cell["settings"]["method"] for cell in cells if _is_pruned(cell)):
        own = [cell for cell in cells if cell["settings"]["method"] == method]
        rows.append(
            {
                "method": method,
                "steps": own[0]["steps"],
                "tokens": own[0]["tokens_used"],
                "seconds": _mean([cell["seconds"] for cell in own]),
                "cpu_seconds": _mean([cell["cpu_seconds"] for cell in own]),
                "peak": _mean([cell["peak_memory"] / 1e6 for cell in own]),
                "cells": len(own),
            }
        )
    columns = {
        **{"method": "method", "steps": "steps", "tokens": "tokens seen", "seconds": "pruning, s"},
        **{"cpu_seconds": "pruning, CPU s"},
        **{"peak": "peak memory, MB", "cells": "runs"},
    }
    return (
        format_table(rows, columns, formats={"seconds": ",.0f", "cpu_seconds": ",.0f", "peak": ",.0f"}) if rows else ""
    )


def draw(cells: Sequence[Mapping[str, Any]], calibration: str, path: Path) -> None:
    """Geometric mean against sparsity, a curve for each method calibrated on ``calibration``; dense as a line."""
    series, baselines = {}, {}
    for (method, name), group in _by_row(cells).items():
        points = []
        for number, level in enumerate(group[0]["levels"]):
            mean = _mean([cell["levels"][number]["geometric_mean"] for cell in group])
            points += [] if mean is None else [(level["sparsity"], mean)]
        if method == DENSE and points:
            baselines[DENSE] = points[0][1]
        elif name in (calibration, None) and points:
            series[method] = points
    if series:  # all of them may have overflowed
        plot_perplexity(series, path, baselines=baselines)


def slug(name: str) -> str:
    """A name as a part of a path: owner/name -> owner-name."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name).strip("-.")


def _is_pruned(cell: Mapping[str, Any]) -> bool:
    return cell["settings"]["method"] != DENSE


def _data_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name of a calibration set -> its domains and shares."""
    settings = [cell["settings"] for cell in cells]
    return {own["calibration"]: own["data"] for own in settings if own["calibration"] is not None}


def _changes_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Variant -> what it changes."""
    changed = {cell["settings"]["method"]: cell["settings"]["changes"] for cell in cells}
    return {
        name: ", ".join(f"{key} {value}" for key, value in changes.items())
        for name, changes in changed.items()
        if changes
    }


def _by_row(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str | None], list[Mapping[str, Any]]]:
    """(method, calibration set) -> its cells, one a seed."""
    rows: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for cell in cells:
        rows.setdefault((cell["settings"]["method"], cell["settings"]["calibration"]), []).append(cell)
    return rows


def _over_seeds(values: Sequence[float | None], function: Callable[[list[float]], float]) -> float | None:
    numbers = [value for value in values if value is not None]
    return function(numbers) if len(numbers) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    return _over_seeds(values, statistics.fmean)


def _spread(values: Sequence[float | None]) -> float | str | None:
    """A number; with several seeds ``mean ± sample standard deviation``."""
    mean = _mean(values)
    if mean is None or len(values) == 1:
        return mean
    return f"{mean:,.2f} ± {_over_seeds(values, statistics.stdev):,.2f}"
