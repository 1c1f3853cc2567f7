"""What each level writes after the same prompt: generated once, kept in ``samples.json`` of the run's folder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_hf.atomic import write_text_atomic
from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.levels.info import LevelInfo
from gisp_hf.untrusted import check_list, check_object, read_json

SAMPLES_FILE = "samples.json"
DENSE = "unpruned"  # the name of the unpruned model, beside those of the levels

_FORMAT = 1
_LARGEST = 2**22  # bytes of a samples.json
_PROMPTS = 100
_TEXT = 20_000  # characters of a prompt or an answer


@dataclass(frozen=True)
class Sample:
    """A prompt, and name of a level (``unpruned``: the unpruned model) -> the text that follows it."""

    prompt: str
    texts: Mapping[str, str]


def check_answer(value: Any, what: str) -> str:
    """A text of bounded length; line breaks are allowed.

    Raises:
        ValueError: if it is no text, or too long.
    """
    if not isinstance(value, str) or len(value) > _TEXT:
        raise ValueError(f"{what} must be a text of at most {_TEXT:,} characters, got {value!r:.60}")
    return value


def generate_samples(
    source: str | Path,
    levels: Iterable[LevelInfo],
    prompts: Sequence[str],
    *,
    base_model: str | None = None,
    max_new_tokens: int = 48,
) -> list[Sample]:
    """Greedy continuations of ``prompts`` by each level, one model in memory at a time.

    Args:
        source: the output folder of a run, or a repository whose branches are the levels.
        base_model: the unpruned model, a folder or a Hub id, to answer as well; None: it does not.
        max_new_tokens: of an answer.

    Raises:
        ValueError: if a prompt is empty or too long; before any model is loaded.
        OSError: if a model is not there.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for prompt in prompts:
        if not check_answer(prompt, "a prompt").strip():
            raise ValueError("a prompt is empty; give a text that the levels can go on with")
    local = Path(source).is_dir()
    models: dict[str, tuple[str, dict[str, str]]] = {} if base_model is None else {DENSE: (base_model, {})}
    for level in levels:
        where = (
            (str(Path(source) / level.name), {}) if local else (str(source), {"revision": level.commit or level.name})
        )
        models[level.name] = where
    texts: list[dict[str, str]] = [{} for _ in prompts]
    for name, (path, revision) in models.items():
        for found, text in zip(texts, _answers(path, revision, prompts, max_new_tokens), strict=True):
            found[name] = text
    return [Sample(prompt, found) for prompt, found in zip(prompts, texts, strict=True)]


def _answers(path: str, revision: Mapping[str, str], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map=device, trust_remote_code=False, **revision
    )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **revision)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with evaluation_mode(model):
            output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        found.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


def write_samples(folder: str | Path, samples: Sequence[Sample]) -> None:
    """Replaces the ``samples.json`` of a run's folder."""
    rows = [{"prompt": sample.prompt, "texts": dict(sample.texts)} for sample in samples]
    text = json.dumps({"format": _FORMAT, "samples": rows}, indent=1, sort_keys=True) + "\n"
    write_text_atomic(Path(folder) / SAMPLES_FILE, text)


def read_samples(folder: str | Path, names: Sequence[str]) -> list[Sample]:
    """The samples of the levels called ``names`` and of the unpruned model; none if there is no file.

    Raises:
        ValueError: if the file is not what ``write_samples`` writes.
    """
    path = Path(folder) / SAMPLES_FILE
    if not path.is_file():
        return []
    try:
        facts = read_json(path, largest=_LARGEST)
        if facts.get("format") != _FORMAT:
            raise ValueError(f"it has format {facts.get('format')!r:.60}, this version reads format {_FORMAT}")
        found = []
        for row in check_list(facts.get("samples"), "samples", longest=_PROMPTS):
            texts = check_object(check_object(row, "a sample").get("texts"), "texts of a sample")
            own = {name: check_answer(texts[name], f"the text of {name}") for name in (DENSE, *names) if name in texts}
            found.append(Sample(check_answer(row.get("prompt"), "a prompt"), own))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; remove it, or make it anew with --prompt") from error
    return [sample for sample in found if sample.texts]
