"""The charts of a category in the report: SVG that takes its text colour from the page around it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from sklearn.metrics import roc_curve

from stpm.data.mvtec import GOOD
from stpm.errors import UndefinedMetricError
from stpm.metrics.category_metrics import AUPRO_LIMITS, LabelledScores
from stpm.metrics.intervals import Scores, require_both_classes
from stpm.metrics.pixel_metrics import Curve

# The page's own colour replaces it. No series has it.
_INK = "#010203"
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    # Okabe and Ito's palette without its black and yellow: the colour-blind can tell them apart on light and dark. For
    # products with more defect types then colours of Paul Tol's.
    "axes.prop_cycle": cycler(
        color=(
            *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
            *("#882255", "#999933", "#661100", "#44aa99", "#6699cc", "#aa4466"),
        )
    ),
    "font.family": "sans-serif",
    "font.size": 9,
    # Pixel curves have up to 131,072 points.
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "none",
    # A label may hold dollar signs.
    "text.parse_math": False,
}
# What matplotlib would write about the file: the date, and links.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

_BINS = 30
# Ratio of the largest to the smallest score above which the bins are equally wide in the logarithm.
_LOG_SCALE_FROM = 30.0


def draw_charts(
    scores: LabelledScores, history: Mapping[str, Sequence[float]], kept_epoch: int, salt: str
) -> dict[str, str]:
    """Draw curves, score histogram and losses of a category as SVG by title, without those that would be empty.

    Args:
        history: columns `number`, `train_loss` and `validation_loss`, an entry per epoch; empty without a student.
        kept_epoch: number of the epoch whose weights were kept.
        salt: makes the ids in these charts differ from those of other charts on the same page.
    """
    curves = roc_curves(scores)
    charts: dict[str, Callable[[Axes], None] | None] = {
        "Curves": partial(_draw_curves, curves=curves) if curves else None,
        "Scores of test images": partial(_draw_histogram, scores=scores) if len(scores.scores) else None,
        "Loss": partial(_draw_losses, history=history, kept_epoch=kept_epoch) if history else None,
    }
    return {title: _svg(draw, f"{salt} {title}") for title, draw in charts.items() if draw}


def draw_thresholds(
    scores: Scores, thresholds: Sequence[float], current: float, defects: Scores | None, salt: str
) -> str:
    """Draw which part of the calibration scores, and of labelled defects, is above each score, as SVG.

    Dots are some thresholds, and the dashed line is the current one. The salt is as in `draw_charts`.
    """

    def draw(axes: Axes) -> None:
        lowest = min(*thresholds, *(values.min() for values in (scores, defects) if values is not None))
        for name, values in {"good images": scores, "labelled defects": defects}.items():
            if values is not None:
                x = [lowest, *np.sort(values)]
                axes.step(x, 100 * np.arange(len(values), -1, -1) / len(values), where="post", label=name)
        above = [100 * float((scores > np.float32(each)).mean()) for each in thresholds]
        axes.plot(thresholds, above, "o", color=_INK, markersize=3, label="thresholds")
        axes.axvline(current, color=_INK, linestyle="--", linewidth=1, label="in force")
        axes.set(xlabel="score", ylabel="images above, %")
        axes.legend(fontsize=7)

    return _svg(draw, salt)


def roc_curves(scores: LabelledScores) -> dict[str, Curve]:
    """Compute false positive rate (x) and recall or per-region overlap (y) of each curve that is defined."""
    curves: dict[str, Curve] = {}
    with suppress(UndefinedMetricError):
        require_both_classes(scores.is_defect, scores.scores)
        curves["image ROC"] = roc_curve(scores.is_defect, scores.scores)[:2]
    with suppress(UndefinedMetricError):
        counts, limit = scores.pixel_counts(), AUPRO_LIMITS["pixel_aupro"]
        curves |= {"pixel ROC": counts.roc_curve(), f"PRO to {limit}": counts.pro_curve(limit)}
    return curves


def histogram_bins(scores: Scores, threshold: float) -> tuple[npt.NDArray[np.float64], bool]:
    """Choose edges that hold every score and the threshold, and whether the scale is logarithmic."""
    low, high = float(min(scores.min(), threshold)), float(max(scores.max(), threshold))
    logarithmic = low > 0 and high / low > _LOG_SCALE_FROM
    # Both have exact ends. A single value gets a range of 1.
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high + (high == low), _BINS + 1)
    return edges, logarithmic


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name)
    axes.set(xlabel="false positive rate", ylabel="recall or overlap", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="lower right")


def _draw_histogram(axes: Axes, scores: LabelledScores) -> None:
    """Draw images by score, stacked by label with the good ones first, and the threshold."""
    edges, logarithmic = histogram_bins(scores.scores, scores.threshold)
    labels = [label for label in (GOOD, *scores.defect_types) if label in scores.labels]
    axes.hist([scores.scores[scores.labels == label] for label in labels], edges.tolist(), stacked=True, label=labels)
    axes.axvline(scores.threshold, color=_INK, linestyle="--", linewidth=1, label="threshold")
    axes.set(xlabel="score", ylabel="images")
    if logarithmic:
        axes.set_xscale("log")
        # Powers of ten need mathematical text, which is off.
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    # Beside the bars, which may be anywhere.
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_losses(axes: Axes, history: Mapping[str, Sequence[float]], kept_epoch: int) -> None:
    """Draw training and validation loss over epochs, and mark the kept epoch."""
    # A single epoch makes no line.
    marker = "." if len(history["number"]) == 1 else None
    for name in ("train_loss", "validation_loss"):
        axes.plot(history["number"], history[name], label=name.replace("_", " "), marker=marker)
    axes.axvline(kept_epoch, color=_INK, linestyle="--", linewidth=1, label="kept")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _svg(draw: Callable[[Axes], None], salt: str) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure((3.6, 2.7), layout="constrained")
        draw(figure.subplots())
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata=_NO_METADATA)
    _, _, svg = sink.getvalue().replace(_INK, "currentColor").partition("<svg ")
    return f'<svg role="img" {svg}'
