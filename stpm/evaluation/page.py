"""report.html: the report as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stpm.evaluation.report import Report
from stpm.metrics.category_metrics import METRICS
from stpm.pages import jpeg_uri, render


def page(report: Report, shortfalls: Sequence[str] = ()) -> str:
    """Render the page; charts and pictures are those of the first seed.

    Text from data is escaped. Nothing is loaded, and no script runs but the page's own.

    Args:
        report: the results.
        shortfalls: of the gate, one line each.
    """
    first_seed = {name: results[0] for name, results in report.by_category().items()}
    return render(
        "evaluation/report.html",
        report=report.contents,
        metrics=METRICS,
        # Matplotlib escapes the text in its SVG.
        charts={name: {title: Markup(svg) for title, svg in one.charts.items()} for name, one in first_seed.items()},  # noqa: S704
        galleries={name: one.galleries for name, one in first_seed.items()},
        seeds=report.seeds,
        shortfalls=shortfalls,
        number=_number,
        spread=_spread,
        jpeg_uri=jpeg_uri,
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(values: Mapping[str, Any], metric: str) -> str:
    """Show a metric's standard deviation over seeds, or with one seed its interval; "" if there is neither."""
    if (std := values[f"{metric}_std"]) is not None:
        return f"± {std:.3f}"
    interval = values.get(f"{metric}_interval")
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
