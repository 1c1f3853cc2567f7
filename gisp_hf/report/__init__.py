"""Tables and plots of a run."""

from gisp_hf.report.plots import COLOURS, MARKERS, plot_loss, plot_perplexity, plot_removed
from gisp_hf.report.tables import format_table

__all__ = ["COLOURS", "MARKERS", "format_table", "plot_loss", "plot_perplexity", "plot_removed"]
