"""Plots of a run: plain rows in, a picture out.

They need matplotlib, which is imported when one is drawn, and are 1200 x 700 pixels. They are drawn on their own
figure: the backend and the style of a notebook stay as they are. The suffix of the path picks the format (``.png``,
``.svg``, ``.pdf``).
"""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the common kinds of colour blindness can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#666666"


def _new_figure() -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'gisp_hf[plots]'") from error
    margins = ConstrainedLayoutEngine(rect=(0.01, 0.015, 0.98, 0.97))  # left, bottom, width, height
    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout=margins)  # 1200 x 700 pixels
    FigureCanvasAgg(figure)  # not pyplot: that would pick a backend for the whole process
    return figure


def _style(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _show_sparsity(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlabel(label)


def plot_perplexity(
    levels: Mapping[str, Iterable[tuple[float, float]]],
    path: str | PathLike[str] | IO[bytes],
    *,
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Perplexity against sparsity, on a logarithmic scale.

    Args:
        levels: name of a series -> its points (sparsity as a fraction 0-1, perplexity), in any order.
        path: the file to write; an open file gets a PNG.
        baselines: name -> perplexity, drawn as horizontal lines: ``{"dense": 23.0}``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no point to draw.
    """
    series = {name: sorted(points) for name, points in levels.items()}
    if not any(series.values()):
        raise ValueError("levels holds no points: give at least one (sparsity, perplexity) pair")
    figure = _new_figure()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = figure.add_subplot()
    for i, (name, points) in enumerate(series.items()):
        dashes = ("-", "--", ":")[i // 6 % 3]  # colours begin again after six curves
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=name, color=COLOURS[i % 6], marker=MARKERS[i % 6], linestyle=dashes, linewidth=2)
    styles = ("--", ":", "-.")
    for i, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(value, color=GREY, linestyle=styles[i % 3], label=f"{name} ({value:,.1f})")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel("perplexity (log scale)")
    _show_sparsity(axes, "sparsity (decoder-layer parameters removed)")
    _style(axes)
    entries = len(series) + len(baselines or {})  # more than the height of the axes holds stand beside them
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": "small", "labelspacing": 0.2}
    axes.legend(framealpha=1, edgecolor="white", **(beside if entries > 16 else {}))
    figure.savefig(path)


def plot_removed(removed: Mapping[float, Mapping[str, Sequence[float]]], path: str | PathLike[str]) -> None:
    """Where the structures were removed: a heat map per level, with a row for each kind and a column for each layer.

    Grey means that the layer lost nothing, so protected layers stay grey at every level.

    Args:
        removed: sparsity of the level (fraction 0-1) -> name of a kind -> fraction removed (0-1) in each layer:
            ``{0.2: {"attention groups": [0.0, 0.33, ...], "MLP channels": [0.0, 0.08, ...]}}``. Any number of kinds,
            drawn in the order given; all of them, of all levels, have the same number of layers.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no level, or the rows differ in length.
    """
    lengths = {len(layers) for kinds in removed.values() for layers in kinds.values()}
    if len(lengths) != 1:
        raise ValueError(f"every kind of every level must list the same layers, got lengths {sorted(lengths)}")
    figure = _new_figure()
    from matplotlib import colormaps

    colours = colormaps["viridis_r"].with_extremes(under="#e6e6e6")
    rows = sum(map(len, removed.values()))
    panels = figure.subplots(len(removed), sharex=True, squeeze=False)[:, 0]
    for axes, (level, kinds) in zip(panels, sorted(removed.items()), strict=True):
        # the least colour starts just above zero: what is exactly zero is grey
        image = axes.pcolormesh(list(kinds.values()), cmap=colours, vmin=1e-9, vmax=1, edgecolors="white", linewidth=1)
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], list(kinds), fontsize=min(10, 120 / rows))
        axes.invert_yaxis()
        axes.set_title(f"{level:.0%} sparsity", loc="left", fontsize=min(10, 120 / rows))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    (layers,) = lengths
    step = max(1, round(layers / 16))
    panels[-1].set_xticks([i + 0.5 for i in range(0, layers, step)], [str(i) for i in range(0, layers, step)])
    panels[-1].set_xlabel("layer")
    bar = figure.colorbar(image, ax=panels, label="structures removed (grey: none)", extend="min", extendfrac=0.03)
    bar.set_ticks([1e-9, 0.2, 0.4, 0.6, 0.8, 1], labels=["0%", "20%", "40%", "60%", "80%", "100%"])
    bar.outline.set_visible(False)
    figure.savefig(path)


def plot_loss(steps: Sequence[Mapping[str, float]], path: str | PathLike[str], *, levels: Sequence[float] = ()) -> None:
    """Calibration loss along a run, against the sparsity it was measured at; the steps stand on the upper axis.

    Args:
        steps: one row a pruning step, {"step": number, "sparsity": fraction 0-1, "loss": mean loss}, in order.
        path: the file to write.
        levels: the sparsities that were saved, marked by vertical lines.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no steps.
    """
    if not steps:
        raise ValueError("steps is empty: give at least one row {'step': ..., 'sparsity': ..., 'loss': ...}")
    figure = _new_figure()
    axes = figure.add_subplot()
    for level in levels:
        axes.axvline(level, color=COLOURS[1], linestyle="--", linewidth=1.2, label="saved level")
    axes.plot(
        [row["sparsity"] for row in steps],
        [row["loss"] for row in steps],
        color=COLOURS[0],
        marker="o" if len(steps) <= 60 else None,
        markersize=4,
        linewidth=2,
        label="calibration loss",
    )
    axes.set_ylabel("calibration loss (nats per token)")
    _show_sparsity(axes, "sparsity reached (decoder-layer parameters removed)")
    _style(axes)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # one entry for all the level marks
    axes.legend(unique.values(), unique.keys(), framealpha=1, edgecolor="white", loc="upper left")

    # a schedule may crawl at its ends: steps are named where they lie far enough apart to be read
    gap = max(0.999 * (steps[-1]["sparsity"] - steps[0]["sparsity"]) / 10, 1e-9)
    shown = [steps[0]]
    for row in steps:
        if row["sparsity"] - shown[-1]["sparsity"] >= gap:
            shown.append(row)
    upper = axes.secondary_xaxis("top")
    upper.set_xticks([row["sparsity"] for row in shown], [f"{row['step']:g}" for row in shown])
    upper.set_xlabel("pruning step")
    upper.spines["top"].set_visible(False)
    figure.savefig(path)


def plot_errors(errors: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """The relative error of each projection before and after a restoration, layer by layer.

    Args:
        errors: ``layer``, ``projection``, ``before`` and ``after`` of each, in any order
            (`gisp_hf.recovery.record.LayerError`).
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no error to draw.
    """
    if not errors:
        raise ValueError("errors is empty: give the errors of a restoration")
    figure = _new_figure()
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(error["projection"] for error in errors)):
        own = sorted((error for error in errors if error["projection"] == name), key=lambda error: error["layer"])
        layers = [error["layer"] for error in own]
        for key, line in (("before", ":"), ("after", "-")):
            axes.plot(
                layers,
                [error[key] for error in own],
                label=f"{name.rpartition('.')[2]} {key}",
                color=COLOURS[i % 6],
                marker=MARKERS[i % 6],
                markersize=4,
                linestyle=line,
                linewidth=2,
            )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the output")
    _style(axes)
    axes.legend(framealpha=1, edgecolor="white")
    figure.savefig(path)
