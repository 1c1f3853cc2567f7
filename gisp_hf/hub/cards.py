"""Model cards: text for readers, metadata for the search of the Hub.

The text is in the templates (``model_cards/*.md``); here are the numbers. Rendering needs no network, and the same
arguments give the same text. Nothing that looks like a token or a path of this machine gets into a card.
"""

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from gisp_hf.export.architectures import HOMES
from gisp_hf.export.run import gguf_name
from gisp_hf.levels.info import LevelInfo
from gisp_hf.models.layout import Kind
from gisp_hf.pruning.trajectory import Trajectory

Metrics = Mapping[float, Sequence[EvalResult]]  # sparsity of a level (0.0: the unpruned model) -> what was measured

TAGS = ["gisp", "pruning", "structured-pruning", "model-compression"]
# What the Hub knows: none means "pruned". A level is a whole model that is loaded by itself, which of these only a
# finetune is; it is also what the Hub would infer. The card says in words that nothing was trained.
RELATIONS = ("adapter", "finetune", "merge", "quantized")
RELATION = "finetune"
# Facts of a calibration (``Calibration.provenance``) in the order in which people ask for them.
CALIBRATION_KEYS = ("name", "objective", "items", "sequences", "tokens", "block_size", "seed", "sha256")

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{8,}")
_TOKEN_OPTION = re.compile(r"((?:--?[\w-]*token|\b\w*TOKEN)[ =])\S+")
_PATH = re.compile(
    r"""(?<![\w.:/<~-])(?:~\w*|\.{1,2})?/[^\s'"`,;)|]+"""  # /home/me, ~/x, ../x; not user/name, https://, </b>
    r"""|(?<!\w)[A-Za-z]:\\[^\s'"`,;)|]*|\\\\\w[^\s'"`,;)|]*|\bfile:[^\s'"`,;)|]+"""
)


def main_card(
    trajectory: Trajectory,
    levels: Sequence[LevelInfo],
    *,
    repo_id: str,
    metrics: Metrics | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    command: str | None = None,
    report: str | None = None,
    curves: str | None = None,
) -> str:
    """The card of ``main``, which holds the mildest level and shows all of them.

    Args:
        levels: at least one, the mildest first, as ``read_levels`` gives them.
        repo_id: where the levels are, or will be: ``user/name``.
        metrics: what was measured, of the unpruned model (0.0) and of the levels. Of a level that is not in it the
            plain numbers of ``LevelInfo.metrics`` are shown.
        license: an identifier of the Hub, such as ``apache-2.0``. If None, that of the base model's card, where the
            Hub cache has it; else the card names none and says so.
        datasets: ids on the Hub of the calibration data; those that the trajectory records if empty.
        versions: package -> version, of the run.
        command: the command of the run; tokens and paths are taken out.
        report, curves: names of the HTML page and of the picture beside the card; None: there is none.

    Returns:
        Markdown with metadata, ready to be the ``README.md``.

    Raises:
        ValueError: if there is no level, or the Hub would refuse the result.
    """
    if not levels:
        raise ValueError("levels is empty; a card needs at least one level")
    if unknown := sorted(set(metrics or {}) - {0.0, *(level.sparsity for level in levels)}):
        raise ValueError(f"metrics has results for {unknown}, and the levels are {[lv.sparsity for lv in levels]}")
    rows = _result_rows(levels, metrics or {})
    labels = _labels(rows)
    kinds = trajectory.layout.kinds
    total, others = trajectory.layout.total, levels[0].parameters - levels[0].decoder_parameters
    table = [["revision", "removed", "parameters", *labels, "commit"]]
    table.append(["unpruned", _percent(0), _short(others + total), *_cells(rows.get(0.0, {}), labels), "-"])
    for level in levels:
        numbers = [_percent(1 - level.decoder_parameters / total), _short(level.parameters)]
        commit = f"`{level.commit[:8]}`" if level.commit else "-"
        table.append([f"`{level.name}`", *numbers, *_cells(rows[level.sparsity], labels), commit])
    if not any(level.commit for level in levels):  # before they are pushed
        table = [row[:-1] for row in table]
    counts = [_counts(trajectory), *(_counts(trajectory, level.sparsity) for level in levels)]
    layers = [
        [
            " / ".join(f"{of[layer, kind.name]:,}" if (layer, kind.name) in of else "-" for kind in kinds)
            for of in counts
        ]
        for layer in range(trajectory.layout.num_layers)
    ]
    shown = levels[len(levels) // 2]
    between = levels[-1].sparsity / 2 if len(levels) < 2 else (levels[-2].sparsity + levels[-1].sparsity) / 2
    return _render(
        "main.md",
        trajectory,
        about=_About(repo_id, license, datasets, versions or {}, command),
        results=(metrics or {}).get(levels[0].sparsity, ()),
        facts={
            "levels": list(levels),
            "restored": any(level.restored for level in levels),
            "recovered": any(level.recovered for level in levels),
            "recovered_names": ", ".join(f"`{level.name}`" for level in levels if level.recovered),
            "shown": shown,
            "branch": shown.name,
            "report": report,
            "curves": curves,
            "gguf": None,
            "gguf_file": gguf_name(repo_id, shown.name),
            "levels_table": _table(table),
            "results": bool(labels),
            "result_notes": _notes(metrics or {}),
            "highest": _percent(math.floor(trajectory.highest_sparsity() * 1e3) / 1e3),
            "between": f"{between:.4g}",
            "kinds": _listed([_title(kind) for kind in kinds]),
            "layers_table": _table([["layers", "unpruned", *(level.name for level in levels)], *_grouped(layers)]),
        },
    )


def level_card(
    trajectory: Trajectory,
    level: LevelInfo,
    *,
    repo_id: str,
    metrics: Metrics | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    command: str | None = None,
    gguf: str | None = None,
) -> str:
    """The card of one level's branch. Arguments, result and errors are those of ``main_card``.

    ``gguf`` is the GGUF file in the branch, if there is one. The card says nothing about the other levels, so that a
    level need not be pushed again when another is added.
    """
    rows = _result_rows([level], metrics or {})
    labels = _labels(rows)
    table = [["model", *labels]]
    table += [["unpruned", *_cells(rows[0.0], labels)]] if 0.0 in rows else []
    table.append([f"`{level.name}`", *_cells(rows[level.sparsity], labels)])
    kinds, sizes, kept = trajectory.layout.kinds, _counts(trajectory), _counts(trajectory, level.sparsity)
    # What a column counts, the kind of structure, and how many of the former are in one structure.
    columns = [("query heads", "attention", heads)] if (heads := _heads_per_group(trajectory)) else []
    columns += [(_title(kind), kind.name, 1) for kind in kinds]
    layers = [
        [
            f"{kept[layer, kind] * many:,} of {sizes[layer, kind] * many:,}" if (layer, kind) in sizes else "-"
            for _, kind, many in columns
        ]
        for layer in range(trajectory.layout.num_layers)
    ]
    removed = []
    for kind in kinds:
        before, after = (sum(n for (_, name), n in of.items() if name == kind.name) for of in (sizes, kept))
        removed.append(f"{before - after:,} of {before:,} {_title(kind)}")
    return _render(
        "level.md",
        trajectory,
        about=_About(repo_id, license, datasets, versions or {}, command),
        results=(metrics or {}).get(level.sparsity, ()),
        facts={
            "level": level,
            "restored": level.restored,
            "recovered": level.recovered,
            "branch": level.name,
            "gguf": gguf,
            "gguf_file": gguf or gguf_name(repo_id, level.name),
            "percent": _percent(1 - level.decoder_parameters / trajectory.layout.total),
            "removed": _listed(removed),
            "parameters": _short(level.parameters),
            "dense_parameters": _short(level.parameters - level.decoder_parameters + trajectory.layout.total),
            "results": bool(labels),
            "results_table": _table(table),
            "result_notes": _notes(metrics or {}),
            "between": f"{level.sparsity / 2:.4g}",
            "layers_table": _table([["layers", *(title for title, _, _ in columns)], *_grouped(layers)]),
        },
    )


def check_card(text: str) -> None:
    """Refuses a card that the Hub would refuse, or that tells what it should not. Needs no network.

    ``ModelCard.validate`` asks the Hub; these are the rules that it publishes for metadata, as far as they are about
    fields that our cards have.

    Raises:
        ValueError: with the field, its value, and what would do.
    """
    if not REGEX_YAML_BLOCK.search(text):
        raise ValueError("the card has no metadata: it must begin with a block of YAML between two lines of ---")
    try:
        data: Any = ModelCard(text).data  # reads the YAML and the model-index
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of the card are no valid YAML: {error}") from error
    for key in ("library_name", "pipeline_tag", "tags"):
        if not data.get(key):
            raise ValueError(f"the metadata of the card lack {key}")
    for name in data.license if isinstance(data.license, list) else filter(None, [data.license]):
        if not isinstance(name, str) or not _LICENSE.fullmatch(name):
            raise ValueError(f"license {name!r} is no identifier of the Hub; use one such as apache-2.0 or llama3.1")
    if data.license == "other" and not (data.license_name and data.license_link):
        raise ValueError("license other needs license_name and license_link too; give one that the Hub lists, or none")
    relation = data.get("base_model_relation")
    if data.get("base_model") and relation not in RELATIONS:
        raise ValueError(f"base_model_relation is {relation!r}; the Hub knows {', '.join(RELATIONS)}")
    for key in ("base_model", "datasets"):
        found = data.get(key) or []
        for name in found if isinstance(found, list) else [found]:
            if not is_hub_id(name):
                raise ValueError(f"{key} names {name!r}, which is no id on the Hub; use user/name")
    for result in data.eval_results or []:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"the result {result.metric_type} is {value!r}; give a finite number, or leave it out")
        if not (result.task_type and result.dataset_type and result.dataset_name and result.metric_type):
            raise ValueError(f"the result {result.metric_type!r} needs task_type, dataset_type and dataset_name")
    for pattern, what in ((_TOKEN, "a token"), (_PATH, "a path of a machine")):
        if match := pattern.search(text):
            shown = match[0][:6] + "..." if pattern is _TOKEN else match[0]
            raise ValueError(f"the card shows {what} ({shown}); leave it out")


# ---- rendering -------------------------------------------------------------------------------------------------------


class _About(NamedTuple):
    """What the author says, and no trajectory knows."""

    repo_id: str
    license: str | None
    datasets: Sequence[str]
    versions: Mapping[str, str]
    command: str | None


def _render(
    template: str, trajectory: Trajectory, *, about: _About, results: Sequence[EvalResult], facts: Mapping[str, Any]
) -> str:
    if not is_hub_id(about.repo_id) or "/" not in about.repo_id:
        raise ValueError(f"repo_id {about.repo_id!r} is no id on the Hub; use user/name")
    name = about.repo_id.rpartition("/")[2]
    base, calibration = trajectory.base, trajectory.calibration
    recorded = [source.get("hub_id") for source in calibration.get("sources") or [] if isinstance(source, dict)]
    public = is_public(trajectory)
    license_data, license_text = _license(trajectory, about.license)
    data = ModelCardData(
        base_model=base.id if public else None,
        base_model_relation=RELATION if public else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=list(dict.fromkeys([*about.datasets] or filter(None, recorded))) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=name if results else None,
        eval_results=list(results) or None,
        **license_data,
    )
    card = ModelCard.from_template(
        data,
        template_str=_read_template(template) + _read_template("common.md"),
        name=name,
        repo_id=about.repo_id,
        base=f"[{base.id}](https://huggingface.co/{base.id})" if public else "A model that is not on the Hub",
        base_revision=base.revision,
        public=public,
        architecture=trajectory.layout.architecture,
        plain=is_plain(trajectory),
        llama_cpp=in_llama_cpp(trajectory.layout.architecture),
        heads=_heads_per_group(trajectory),
        fingerprint=base.fingerprint,
        method=trajectory.config.method,
        num_steps=trajectory.config.num_steps,
        calibration=_calibration_lines(calibration),
        versions=", ".join(f"{_clean(key)} {_clean(value)}" for key, value in sorted(about.versions.items())),
        command=_without_secrets(about.command).replace("```", "~~~").strip() if about.command else None,
        config=yaml.safe_dump(trajectory.config.to_dict(), sort_keys=False, default_flow_style=None).strip(),
        license_text=license_text,
        **facts,
    )
    text = str(card).rstrip() + "\n"
    check_card(text)
    return text


def is_plain(trajectory: Trajectory) -> bool:
    """Whether the levels are models of their family's own class, which need no code of this package."""
    # Fewer layers alone need no code of ours; layers of a base that was pruned before may differ in size.
    layout = trajectory.layout
    return trajectory.config.uniform or (layout.whole and len({block.cost for block in layout.blocks}) == 1)


def in_llama_cpp(family: str) -> str | None:
    """How llama.cpp holds pruned models of a family: ``pruned``, ``padded`` (with zeros), or None: not at all."""
    home = HOMES.get(family)
    return None if home is None else "padded" if home.pruned is None else "pruned"


def _read_template(name: str) -> str:
    installed = resources.files("gisp_hf") / "model_cards" / name
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    # In a checkout, and in an editable install of one, the folder is beside the package and not in it.
    return (Path(__file__).resolve().parents[2] / "model_cards" / name).read_text(encoding="utf-8")


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def _grouped(layers: Sequence[list[str]]) -> list[list[str]]:
    """One row for all neighbours that are alike, under the numbers of the first and the last."""
    rows: list[list[str]] = []
    first = 0
    for number, cells in enumerate(layers):
        if number + 1 == len(layers) or layers[number + 1] != cells:
            rows.append([str(first) if first == number else f"{first}-{number}", *cells])
            first = number + 1
    return rows


def _cells(numbers: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    found = [numbers.get(label) for label in labels]
    return ["-" if n is None else f"{n:,.0f}" if abs(n) >= 1000 else f"{n:.4g}" for n in found]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _short(number: int) -> str:
    if number >= 10**9:
        return f"{number / 10**9:.2f}B"
    return f"{number / 10**6:.1f}M" if number >= 10**6 else f"{number:,}"


# ---- facts -----------------------------------------------------------------------------------------------------------


def _counts(trajectory: Trajectory, sparsity: float | None = None) -> dict[tuple[int, str], int]:
    """(layer, kind) -> structures, of the unpruned model or of a level."""
    blocks = trajectory.layout.blocks
    sizes = [block.size for block in blocks] if sparsity is None else [len(keep) for keep in trajectory.kept(sparsity)]
    return {(block.layer, block.kind): size for block, size in zip(blocks, sizes)}


def _title(kind: Kind) -> str:
    return kind.title or kind.plural


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _heads_per_group(trajectory: Trajectory) -> int:
    """Query heads in a key/value group; 0 without attention."""
    numbers = trajectory.layout.of_kind("attention")
    if not numbers:
        return 0
    widths = [member.width for member in trajectory.layout.blocks[numbers[0]].members]
    return max(widths) // min(widths)  # a query projection has all heads of a group, a key projection one


def _label(result: EvalResult) -> str:
    return _clean(f"{result.dataset_name} {result.metric_name or result.metric_type}")


def _result_rows(levels: Sequence[LevelInfo], metrics: Metrics) -> dict[float, dict[str, Any]]:
    """Sparsity -> label -> number."""
    rows: dict[float, dict[str, Any]] = {level.sparsity: dict(level.metrics) for level in levels}
    for sparsity in [0.0, *rows]:
        if sparsity in metrics:
            rows[sparsity] = {_label(result): result.metric_value for result in metrics[sparsity]}
    return rows


def _labels(rows: Mapping[float, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(label for row in rows.values() for label in row))


def _notes(metrics: Metrics) -> str:
    """How the numbers came about, as far as the results say: ``WikiText-2 perplexity with window 128``."""
    results = [result for measured in metrics.values() for result in measured]
    notes = {
        f"{_label(result)} with {', '.join(f'{_clean(key)} {_clean(value)}' for key, value in sorted(args.items()))}"
        for result in results
        if (args := {**(result.dataset_args or {}), **(result.metric_args or {})})
    }
    return "; ".join(sorted(notes))


def _calibration_lines(calibration: Mapping[str, Any]) -> list[str]:
    if not calibration:
        return ["calibration data: not recorded"]
    known = [key for key in CALIBRATION_KEYS if key in calibration]
    plain = [key for key in sorted(calibration) if key not in known and not isinstance(calibration[key], (dict, list))]
    facts = [(key.replace("_", " "), calibration[key]) for key in [*known, *plain] if calibration[key] is not None]
    lines = [f"calibration data: {', '.join(f'{_clean(key)} {_clean(value)}' for key, value in facts)}"]
    for source in calibration.get("sources") or []:
        if isinstance(source, dict):
            where = [source.get("hub_id") or "a local file", source.get("config"), source.get("split")]
            named = [_clean(part) for part in where if part]
            named += [f"revision {_clean(source['revision'])}"] if source.get("revision") else []
            named += [f"{_clean(source[key])} {key}" for key in ("records", "tokens") if source.get(key) is not None]
            lines.append(f"calibration source: {', '.join(named)}")
    return lines


def _license(trajectory: Trajectory, license: str | None) -> tuple[dict[str, Any], str]:
    """The metadata, and the sentence."""
    if license is not None:
        return {"license": license}, f"`{_clean(license)}`"
    base = trajectory.base
    path = try_to_load_from_cache(base.id, "README.md", revision=base.revision) if is_public(trajectory) else None
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data if isinstance(path, str) else ModelCardData()
    except (ValueError, yaml.YAMLError):  # a card that says nothing a program could read
        data = ModelCardData()
    if not data.license:
        return {}, "That of the base model. It was not at hand when this card was written, so the metadata name none."
    found = {"license": data.license}
    if data.license == "other":  # a link may be relative to the repository of the base model
        link = urljoin(f"https://huggingface.co/{base.id}/blob/main/", data.license_link or "LICENSE")
        found |= {"license_name": data.license_name or "license-of-the-base-model", "license_link": link}
    named = data.license if isinstance(data.license, str) else ", ".join(data.license)
    return found, f"That of the base model: `{found.get('license_name', named)}`."


# ---- privacy ---------------------------------------------------------------------------------------------------------


def is_hub_id(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not _PATH.search(name)


def is_public(trajectory: Trajectory) -> bool:
    """Whether the base model has a name that means something elsewhere: an id, and no folder of this machine."""
    base = trajectory.base
    return is_hub_id(base.id) and (base.revision is not None or ("/" in base.id and not Path(base.id).exists()))


def _without_secrets(text: str) -> str:
    return _PATH.sub("<path>", _TOKEN.sub("<token>", _TOKEN_OPTION.sub(r"\1<token>", text)))


def _clean(value: Any) -> str:
    """One line that is safe in a table, without tokens and paths."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(_without_secrets(str(value)).replace("|", "\\|").replace("`", "'").split())
