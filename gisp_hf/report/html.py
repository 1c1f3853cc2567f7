"""One self-contained HTML page about a run: its facts as JSON, and a style and a script that show them.

The page loads nothing: its Content-Security-Policy allows its own script and style, by their hashes, and nothing else.
The same facts give the same bytes.
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from gisp_hf.levels.info import LevelInfo
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.report.curves import CURVES_FILE, has_curves, perplexity_picture
from gisp_hf.report.facts import report_facts
from gisp_hf.report.samples import Sample

REPORT_FILE = "report.html"

# In a script element only "<" can end it; the others are line ends to some readers of JSON.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def render_page(facts: Mapping[str, Any]) -> str:
    """The page that shows ``facts``, as `report_facts` gives them.

    Raises:
        ValueError: if a number is not finite, which JSON cannot hold.
    """
    style, script = (_read(name) for name in ("page.css", "page.js"))
    text = json.dumps(facts, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return Template(_read("page.html")).substitute(
        title=html.escape(str(facts["title"])),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        facts=text.translate(_ESCAPES),
    )


def report_page(
    trajectory: Trajectory,
    levels: Sequence[LevelInfo],
    *,
    source: str | os.PathLike[str],
    title: str | None = None,
    folder: Path | None = None,
    samples: Sequence[Sample] | None = None,
) -> str:
    """The page of a run. Arguments and errors are those of `report_facts`; the title is the name of the source."""
    name = source if isinstance(source, str) else Path(source).resolve().name
    return render_page(
        report_facts(trajectory, levels, source=source, title=title or name, folder=folder, samples=samples)
    )


def report_writer(folder: str | Path, repo_id: str) -> Callable[[Trajectory, Sequence[LevelInfo]], dict[str, bytes]]:
    """A function that gives a push the report of a run in ``folder``, whose commands name the repository.

    It returns name -> contents: the page, and the picture of the card where there are curves to draw.
    """

    def write(trajectory: Trajectory, levels: Sequence[LevelInfo]) -> dict[str, bytes]:
        page = report_page(trajectory, levels, source=repo_id, folder=Path(folder))
        pictures = {CURVES_FILE: perplexity_picture(levels)} if has_curves(levels) else {}
        return {REPORT_FILE: page.encode(), **pictures}

    return write


def _read(name: str) -> str:
    return (resources.files("gisp_hf.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Of an element's text, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
