"""Markdown tables: plain rows in, text out."""

from collections.abc import Mapping, Sequence
from typing import Any


def _format_value(value: Any, spec: str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if spec is None and isinstance(value, (int, float)) and not isinstance(value, bool):
        spec = ",d" if isinstance(value, int) else ",.2f"
    return format(value, spec) if spec is not None else str(value)


def format_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, formats: Mapping[str, str] | None = None
) -> str:
    """A Markdown table, padded so that it reads well in a terminal too; columns of numbers are right-aligned.

    Args:
        rows: one mapping a line. ``None`` is shown as ``-``. Keys that no column names are left out.
        columns: key in the rows -> heading, in the order of the columns.
        formats: key -> format specification, such as ``".0%"``. The default is ``",d"`` for integers and ``",.2f"``
            for floats.

    Returns:
        The lines, joined by newlines, with none at the end.

    Raises:
        ValueError: there are no columns, a row lacks one, or ``formats`` names a key that is no column.
    """
    formats = formats or {}
    if not columns:
        raise ValueError("columns is empty: give at least one, as {key in the rows: heading}")
    if unknown := formats.keys() - columns.keys():
        raise ValueError(f"formats names {sorted(unknown)}, which are not among the columns {list(columns)}")
    for i, row in enumerate(rows):
        if missing := columns.keys() - row.keys():
            raise ValueError(f"row {i} lacks {sorted(missing)}: give every row all columns, None for an empty cell")

    table = []  # one list of cells per column, the heading first, then its rule
    for key, heading in columns.items():
        values = [row[key] for row in rows]
        cells = [heading, *(_format_value(value, formats.get(key)) for value in values)]
        width = max(3, *map(len, cells))
        numeric = all(isinstance(value, (int, float)) for value in values if value is not None)
        cells = [cell.rjust(width) if numeric else cell.ljust(width) for cell in cells]
        cells.insert(1, "-" * (width - 1) + ":" if numeric else "-" * width)
        table.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*table, strict=True))
