"""The numbers and texts of a report, as JSON holds them. Everything a reader sees comes from here."""

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gisp_hf.export.run import gguf_name
from gisp_hf.hub.cards import in_llama_cpp, is_plain, is_public
from gisp_hf.levels.info import LevelInfo
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.report.samples import DENSE, Sample, check_answer, read_samples
from gisp_hf.untrusted import printable, read_json_rows

RESULTS_FILE, SPEED_FILE = "results.json", "speed.json"  # of the quickstart and its benchmark of speed

_LARGEST = 2**22  # bytes of either
_SPEEDS = {"prefill": "prefill tokens/s", "decode": "decode tokens/s"}
# What a metric's name tells of its direction, the first match counts.
_BETTER = (
    (re.compile("stderr|std", re.IGNORECASE), None),
    (re.compile("perplexity|ppl|loss|seconds|latency", re.IGNORECASE), "lower"),
    (re.compile(r"acc|exact_match|\bem\b|f1|tokens/s|tokens_per_second", re.IGNORECASE), "higher"),
)

logger = logging.getLogger(__name__)

Rows = Mapping[str, Mapping[str, Any]]  # name of a level, or "dense" -> what a file says about it


def report_facts(
    trajectory: Trajectory,
    levels: Sequence[LevelInfo],
    *,
    source: str | os.PathLike[str],
    title: str,
    folder: Path | None = None,
    samples: Sequence[Sample] | None = None,
) -> dict[str, Any]:
    """All that a report shows. The same run, the same facts.

    Args:
        trajectory: of the whole run.
        levels: at least one, the mildest first, as ``read_levels`` gives them.
        source: the repository or folder that the command lines name.
        title: the heading.
        folder: the output folder of the run, where sizes of files, ``samples.json``, ``results.json`` and
            ``speed.json`` are looked for; None: those are not known.
        samples: take these instead of the ones in the folder.

    Raises:
        ValueError: if the levels do not fit the trajectory, or a file in the folder is damaged.
    """
    if not levels:
        raise ValueError("levels is empty; a report needs at least one level")
    total = trajectory.layout.total
    for level in levels:
        if level.decoder_parameters > total:
            raise ValueError(
                f"{level.name} has {level.decoder_parameters:,} parameters in its decoder layers, and the base "
                f"{total:,}: it belongs to another run"
            )
    names = [level.name for level in levels]
    results = {} if folder is None else _read_rows(folder / RESULTS_FILE)
    speeds = {} if folder is None else _read_rows(folder / SPEED_FILE)
    if samples is None:
        samples = [] if folder is None else [*read_samples(folder, names), *_samples_of(results, names)]
    measured = {level.name: {**level.metrics, **_speeds(speeds.get(level.name, {}))} for level in levels}
    known = list(dict.fromkeys(name for metrics in measured.values() for name in metrics))
    dense = {name: value for name in known if (value := _number(results.get("dense", {}), name)) is not None}
    dense |= _speeds(speeds.get("dense", {}))
    removed = {level.name: 1 - level.decoder_parameters / total for level in levels}
    public = is_public(trajectory)
    return {
        "title": printable(title),
        "base": {
            "name": trajectory.base.id if public else "a model that is not on the Hub",
            "link": f"https://huggingface.co/{trajectory.base.id}" if public else None,
        },
        "architecture": trajectory.layout.architecture,
        "method": trajectory.config.method,
        "steps": f"{trajectory.config.num_steps} steps" if trajectory.config.num_steps > 1 else "one step",
        "dense": {
            "name": DENSE,
            "removed": 0.0,
            "parameters": levels[0].parameters - levels[0].decoder_parameters + total,
            "metrics": dense,
        },
        "levels": [
            {
                "name": level.name,
                "sparsity": level.sparsity,
                "removed": removed[level.name],
                "parameters": level.parameters,
                "bytes": None if folder is None else _weight_bytes(folder / level.name),
                "restored": level.restored,
                "commit": level.commit,
                "metrics": measured[level.name],
            }
            for level in levels
        ],
        "charts": [*_charts(measured, dense, results, removed), *_loss_chart(trajectory)],
        "layers": _layers(trajectory, levels),
        "samples": [{"prompt": sample.prompt, "texts": dict(sample.texts)} for sample in samples],
        "commands": {level.name: _commands(trajectory, level, source=source) for level in levels},
    }


# ---- files of the quickstart -----------------------------------------------------------------------------------------


def _read_rows(path: Path) -> Rows:
    """Level -> row. A file of this name may be anybody's: one of another shape is left out, with a warning."""
    if not path.is_file():
        return {}
    try:
        rows = read_json_rows(path, largest=_LARGEST)
        for row in rows:
            check_answer(row.get("text", ""), "text")
        return {row["level"]: row for row in rows if isinstance(row.get("level"), str)}
    except ValueError as error:
        logger.warning("%s is not what the quickstart writes, and the report leaves it out: %s", path, printable(error))
        return {}


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _speeds(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for key, name in _SPEEDS.items() if (value := _number(row, key)) is not None}


def _samples_of(results: Rows, names: Sequence[str]) -> list[Sample]:
    """The texts in the quickstart's rows. Each begins with the prompt, which is what all of them share."""
    rows = {DENSE: results.get("dense", {}), **{name: results.get(name, {}) for name in names}}
    texts = {name: row["text"] for name, row in rows.items() if "text" in row}
    if not texts:
        return []
    shared = os.path.commonprefix(list(texts.values())) if len(texts) > 1 else ""
    prompt = shared[: shared.rfind(" ") + 1]  # whole words
    return [Sample(prompt.rstrip(), {name: text[len(prompt) :] for name, text in texts.items()})]


def _weight_bytes(level_folder: Path) -> int | None:
    return sum(path.stat().st_size for path in level_folder.glob("model*.safetensors")) or None


# ---- curves and layers -----------------------------------------------------------------------------------------------


def _charts(
    measured: Mapping[str, Mapping[str, float | None]],
    dense: Mapping[str, float],
    results: Rows,
    removed: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One chart a metric, perplexities first; points are (share removed, value)."""
    charts = []
    for name in dict.fromkeys(name for metrics in measured.values() for name in metrics):
        found = {"levels": {level: metrics.get(name) for level, metrics in measured.items()}}
        if name == "perplexity":  # what the quickstart knows of it besides
            before = {level: _number(results.get(level, {}), "pruned") for level in measured}
            if any(value is not None for value in before.values()):
                found = {"restored": found["levels"], "before restoration": before}
            found["one shot"] = {level: _number(results.get(level, {}), "one_shot") for level in measured}
        series = [
            {"label": label, "points": [[removed[level], v] for level, v in values.items() if v is not None]}
            for label, values in found.items()
        ]
        if series := [one for one in series if one["points"]]:
            better = next((way for pattern, way in _BETTER if pattern.search(name)), None)
            charts.append({"name": name, "better": better, "dense": dense.get(name), "series": series})
    return sorted(charts, key=lambda chart: "perplexity" not in chart["name"])


def _loss_chart(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The calibration loss along the run. A step's loss is that of the model before its removals."""
    before = [0.0, *(step.sparsity for step in trajectory.steps)]
    points = [
        [sparsity, step.loss]
        for step, sparsity in zip(trajectory.steps, before)
        if step.loss is not None and math.isfinite(step.loss)
    ]
    if len(points) < 2:
        return []
    return [
        {"name": "calibration loss", "better": "lower", "dense": None, "series": [{"label": "run", "points": points}]}
    ]


def _layers(trajectory: Trajectory, levels: Sequence[LevelInfo]) -> list[dict[str, Any]]:
    """Of each kind: its structures in each layer of the unpruned model (0: none), and those that each level keeps."""
    layout = trajectory.layout
    kept = {level.name: trajectory.kept(level.sparsity) for level in levels}
    found = []
    for kind in layout.kinds:
        numbers = layout.of_kind(kind.name)

        def by_layer(counts: Sequence[int], numbers: Sequence[int] = numbers) -> list[int]:
            layers = [0] * layout.num_layers
            for number in numbers:
                layers[layout.blocks[number].layer] += counts[number]
            return layers

        found.append(
            {
                "kind": kind.title or kind.plural,
                "sizes": by_layer([block.size for block in layout.blocks]),
                "kept": {name: by_layer([len(keep) for keep in keeps]) for name, keeps in kept.items()},
            }
        )
    return found


# ---- command lines ---------------------------------------------------------------------------------------------------


def _commands(trajectory: Trajectory, level: LevelInfo, *, source: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Title and text of each way to load a level: a folder if ``source`` is a path, else a repository."""
    local = isinstance(source, os.PathLike)
    place = str(Path(source) / level.name) if local else str(source)
    revision = "" if local else f", revision={_quoted(level.name)}"
    plain = is_plain(trajectory)
    load = [
        *([] if plain else ["import gisp_hf  # teaches transformers models whose layers differ in size"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(place)}{revision})",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(place)}{revision})",
    ]
    adapter = [
        "from peft import LoraConfig, get_peft_model",
        "",
        'model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))',
    ]
    branch = "" if local else f" --revision {level.name}"
    serve = f"vllm serve {shlex.quote(place)}{branch}" + ("" if plain else " --trust-remote-code  # modeling_gisp.py")
    found = [("Transformers", load), ("PEFT", adapter), ("vLLM", [serve])]
    if kind := in_llama_cpp(trajectory.layout.architecture):
        name = gguf_name(str(source) if not local else Path(source).resolve().name, level.name)
        pad = " --pad" if kind == "padded" else ""
        export = f"gisp-hf export {shlex.quote(place)}{branch} --gguf {shlex.quote(name)}{pad}"
        title = "llama.cpp" + (", padded with zeros to full size" if pad else "")
        found.append((title, ["pip install 'gisp_hf[export]'", export, f"llama-cli -m {shlex.quote(name)}"]))
    whole = shlex.quote(str(source))
    base = "" if is_public(trajectory) or local else " --base-model FOLDER_OF_THE_UNPRUNED_MODEL"
    cut = f"gisp-hf materialize {whole} --sparsity {level.sparsity / 2:.4g} --output cut{base}"
    found.append(("Any other sparsity", [cut]))
    return [{"title": title, "text": "\n".join(map(printable_command, lines))} for title, lines in found]


def printable_command(line: str) -> str:
    """The line without characters that hide what it does."""
    return line if line.isprintable() else printable(line)


def _quoted(text: str) -> str:
    return json.dumps(text)
