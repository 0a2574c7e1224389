"""The losses of a fit as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from stpm.fitting.task import Epoch


def loss_curves(history: Sequence[Epoch], kept: int, title: str) -> bytes:
    """Training and validation loss over epochs, the kept epoch marked: a PNG of 640 × 400."""
    figure = Figure(figsize=(6.4, 4.0), dpi=100)
    # A place of its own: finding one would take longer than a small category's fit.
    axes = figure.add_axes((0.12, 0.13, 0.84, 0.78))
    epochs = [epoch.number for epoch in history]
    axes.plot(epochs, [epoch.train_loss for epoch in history], label="training", marker=".")
    axes.plot(epochs, [epoch.validation_loss for epoch in history], label="validation", marker=".")
    axes.axvline(kept, color="grey", linestyle=":", label=f"kept: {kept}")
    # A category's name is text, whatever dollar signs it has.
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="epoch", ylabel="loss (0 to 2)", yscale="log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()
