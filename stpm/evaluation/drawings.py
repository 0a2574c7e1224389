"""Curves and histograms as SVG that takes its text colour from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from stpm.evaluation.curves import Curves, Histogram, Points
from stpm.mvtec import GOOD

_SIZE = (3.6, 2.7)
# Stands for the page's own colour until the picture is there: no series has it.
_INK = "#010203"
# Okabe and Ito's palette without its black and yellow: told apart by the colour-blind, and legible on light and dark.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def curves(of: Curves, limit: float, salt: str) -> str:
    """ROC over images and pixels, and per-region overlap up to its limit; "" if none is defined."""
    named = {"image ROC": of.image_roc, "pixel ROC": of.pixel_roc, f"PRO to {limit}": of.pixel_pro}
    known: dict[str, Points] = {name: points for name, points in named.items() if points}
    if not known:
        return ""
    with _drawn(salt) as (axes, done):
        for (name, (x, y)), colour in zip(known.items(), _COLOURS, strict=False):
            axes.plot(x, y, label=name, color=colour)
        axes.set(xlabel="false positive rate", ylabel="recall or overlap", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.legend(loc="lower right")
    return done[0]


def scores(of: Histogram, salt: str) -> str:
    """Images by score, stacked by label, with the threshold."""
    labels = sorted(of.counts, key=lambda label: (label != GOOD, label))
    with _drawn(salt) as (axes, done):
        axes.hist(
            [of.edges[:-1]] * len(labels),
            bins=of.edges,
            weights=[of.counts[label] for label in labels],
            stacked=True,
            label=labels,
            color=[_COLOURS[i % len(_COLOURS)] for i in range(len(labels))],
        )
        axes.axvline(of.threshold, color=_INK, linestyle="--", linewidth=1, label="threshold")
        axes.set(xlabel="score", ylabel="images")
        if of.logarithmic:
            axes.set_xscale("log")
            # Without mathematics in labels, which names from data might start, powers would show as source text.
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=7)
    return done[0]


def losses(history: Mapping[str, Sequence[float]], kept_epoch: int, salt: str) -> str:
    """Training and validation loss per epoch, and the epoch that was kept."""
    with _drawn(salt) as (axes, done):
        for name, colour in zip(("train_loss", "validation_loss"), _COLOURS, strict=False):
            axes.plot(history["number"], history[name], label=name.replace("_", " "), color=colour)
        axes.axvline(kept_epoch, color=_INK, linestyle="--", linewidth=1, label="kept")
        axes.set(xlabel="epoch", ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return done[0]


@contextmanager
def _drawn(salt: str) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; after the block the list holds the SVG. `salt` keeps its ids apart from others' on one page."""
    done: list[str] = []
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(_SIZE, layout="constrained")
        yield figure.subplots(), done
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    svg = _METADATA.sub("", _PROLOGUE.sub("", sink.getvalue()))
    done.append(svg.replace(_INK, "currentColor").replace("<svg ", '<svg role="img" ', 1))
