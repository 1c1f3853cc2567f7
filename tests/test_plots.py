"""Plots, by what matplotlib drew and by the size of the file."""

import struct
import sys

import pytest

from gisp_hf.report import plot_loss, plot_perplexity, plot_removed, plots

LEVELS = {"iterative": [(0.4, 83.5), (0.2, 34.2)], "one shot": [(0.2, 41.9), (0.4, 310.0)]}


REMOVED = {
    0.4: {"attention groups": [0.0, 1 / 3, 2 / 3, 0.0], "MLP channels": [0.0, 0.5, 0.8, 0.0]},
    0.2: {"attention groups": [0.0, 0.0, 1 / 3, 0.0], "MLP channels": [0.0, 0.2, 0.4, 0.0]},
}


STEPS = [{"step": k, "sparsity": 0.1 * k, "loss": 3.0 + 0.5 * k} for k in range(5)]


PLOTS = {
    "perplexity": lambda path: plot_perplexity(LEVELS, path, baselines={"dense": 23.0}),
    "removed": lambda path: plot_removed(REMOVED, path),
    "loss": lambda path: plot_loss(STEPS, path, levels=[0.2, 0.4]),
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that the plot functions make, to look into."""
    made, new_figure = [], plots._new_figure
    monkeypatch.setattr(plots, "_new_figure", lambda: made.append(new_figure()) or made[-1])
    return made


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_are_png_of_1200_by_700_pixels(tmp_path, plot):
    path = tmp_path / "plot.png"
    PLOTS[plot](path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 700)
    assert len(data) > 5_000  # an empty canvas of this size takes 3,000 bytes


def test_perplexity_plot_draws_every_point_in_order(tmp_path, figures):
    PLOTS["perplexity"](tmp_path / "plot.png")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines.keys() == {"iterative", "one shot", "dense (23.0)"}
    assert lines["iterative"].get_xydata().tolist() == [[0.2, 34.2], [0.4, 83.5]]
    assert set(lines["dense (23.0)"].get_ydata()) == {23.0}
    assert axes.get_yscale() == "log"


def test_names_of_many_curves_stand_beside_the_axes(tmp_path, figures):
    plot_perplexity({f"method-{i}": [(0.2, 20.0 + i), (0.4, 40.0 + i)] for i in range(25)}, tmp_path / "many.png")
    (axes,) = figures[0].axes
    names, drawn = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert names.x0 >= drawn.x1 and drawn.height > 0.8 * figures[0].bbox.height


def test_removed_plot_has_a_panel_for_each_level_mildest_first(tmp_path, figures):
    PLOTS["removed"](tmp_path / "plot.png")
    *panels, _bar = figures[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["20% sparsity", "40% sparsity"]
    for axes, level in zip(panels, (0.2, 0.4), strict=True):
        (mesh,) = axes.collections
        assert mesh.get_array().tolist() == list(REMOVED[level].values())
        assert [label.get_text() for label in axes.get_yticklabels()] == list(REMOVED[level])
        grey, least = mesh.cmap(mesh.norm([0.0, 0.001]))
        assert max(grey[:3]) - min(grey[:3]) < 0.01 < max(least[:3]) - min(least[:3])


@pytest.mark.parametrize("kinds", [["experts"], ["attention groups", "MLP channels", "experts"]])
def test_removed_plot_has_a_row_for_each_kind_it_is_given(tmp_path, figures, kinds):
    plot_removed({0.2: {kind: [0.1 * i, 0.5] for i, kind in enumerate(kinds)}}, tmp_path / "plot.png")
    panel, _bar = figures[0].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == kinds
    (mesh,) = panel.collections
    assert mesh.get_array().tolist() == [[0.1 * i, 0.5] for i in range(len(kinds))]


def test_loss_plot_marks_the_levels(tmp_path, figures):
    PLOTS["loss"](tmp_path / "plot.png")
    axes = figures[0].axes[0]
    *marks, loss = axes.get_lines()
    assert [mark.get_xdata()[0] for mark in marks] == [0.2, 0.4]
    assert loss.get_ydata().tolist() == [3.0, 3.5, 4.0, 4.5, 5.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["saved level", "calibration loss"]
    (upper,) = axes.child_axes
    assert [text.get_text() for text in upper.get_xticklabels()] == ["0", "1", "2", "3", "4"]


def test_plots_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="levels holds no points"):
        plot_perplexity({"iterative": []}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="steps is empty"):
        plot_loss([], tmp_path / "plot.png")
    with pytest.raises(ValueError, match=r"got lengths \[1, 2\]"):
        plot_removed({0.2: {"attention groups": [0.0], "MLP channels": [0.0, 0.1]}}, tmp_path / "plot.png")


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_without_matplotlib_name_the_extra(tmp_path, monkeypatch, plot):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'gisp_hf\[plots\]'"):
        PLOTS[plot](tmp_path / "plot.png")


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_never_touch_pyplot(tmp_path, monkeypatch, plot):
    """Pyplot is what holds the backend of a notebook: importing it would fail here."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    PLOTS[plot](tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
