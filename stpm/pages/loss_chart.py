"""Draw the loss curve of a fit, for the model store and for the report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_losses(axes: Axes, history: Mapping[str, Sequence[float]], kept_epoch: int) -> None:
    """Draw training and validation loss over epochs, and mark the kept epoch.

    Args:
        axes: empty axes.
        history: columns `number`, `train_loss` and `validation_loss`, one entry per epoch.
        kept_epoch: number of the epoch whose weights were kept.
    """
    # A single epoch makes no line.
    marker = "." if len(history["number"]) == 1 else None
    for name in ("train_loss", "validation_loss"):
        axes.plot(history["number"], history[name], label=name.replace("_", " "), marker=marker)
    axes.axvline(kept_epoch, color=mpl.rcParams["text.color"], linestyle="--", linewidth=1, label="kept")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def loss_png(history: Mapping[str, Sequence[float]], kept_epoch: int, title: str) -> bytes:
    """Draw the losses as a PNG of 640 × 400 pixels."""
    figure = Figure(figsize=(6.4, 4.0), dpi=100)
    # Fixed axes: a layout engine would take longer than the fit of a small category.
    axes = figure.add_axes((0.12, 0.13, 0.84, 0.78))
    draw_losses(axes, history, kept_epoch)
    # A category's name may hold dollar signs.
    axes.set_title(title, parse_math=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()
