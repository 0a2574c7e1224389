"""report.html: the report as one page that needs no network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stpm import storage
from stpm.evaluation import drawings, published
from stpm.evaluation.category import AUPRO_LIMITS
from stpm.evaluation.report import Report, Result
from stpm.pages import jpeg_uri, template

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

# In the order of the table: what papers compare first.
METRICS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupro": "AUPRO 0.3",
    "image_recall": "recall",
    "image_false_alarm_rate": "false alarms",
    "image_average_precision": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_average_precision": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "pixel_aupro_05": "AUPRO 0.05",
}


def write_page(report: Report, out: str, shortfalls: Sequence[str] = ()) -> None:
    """Write report.html under a URI.

    Args:
        report: what it shows. Pictures and curves are those of the first seed.
        out: the run folder.
        shortfalls: what the report falls short of, a line each.
    """
    storage.publish(storage.join(out, "report.html"), page(report, shortfalls).encode())


def page(report: Report, shortfalls: Sequence[str] = ()) -> str:
    """The page's HTML. Whatever comes from data is escaped; nothing is loaded, and no script but its own runs."""
    summary = report.as_json()
    of_category = report.categories()
    text = template("evaluation/report.html").render(
        report=summary,
        metrics=METRICS,
        compared=published.METRICS if any(name in published.MVTEC_AD for name in of_category) else (),
        categories=[
            {
                "name": name,
                "id": f"category-{number}",
                "values": values,
                "pictures": _pictures(of_category[name][0], number),
                "galleries": _galleries(of_category[name][0]),
            }
            for number, (name, values) in enumerate(summary["categories"].items())
        ],
        seeds=sorted({result.model.recipe.seed for result in report.results}),
        shortfalls=shortfalls,
        number=_number,
        spread=_spread,
        difference=_difference,
        script_hash="SCRIPT-HASH",
    )
    script = _SCRIPT.findall(text)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text.replace("SCRIPT-HASH", f"sha256-{digest}", 1)


def _pictures(result: Result, number: int) -> dict[str, Markup]:
    """SVG by what it shows. Matplotlib escapes the text in it."""
    of = result.figures.curves
    pictures = {"Curves": drawings.curves(of, AUPRO_LIMITS["pixel_aupro"], f"c{number}")}
    if of.scores:
        pictures["Scores of test images"] = drawings.scores(of.scores, f"s{number}")
    if result.history:
        pictures["Loss"] = drawings.losses(result.history, result.model.fit.kept_epoch, f"l{number}")
    return {title: Markup(svg) for title, svg in pictures.items() if svg}  # noqa: S704


def _galleries(result: Result) -> dict[str, list[dict[str, Any]]]:
    return {
        kind: [
            {
                "picture": jpeg_uri(tile.picture),
                "name": "/".join(tile.uri.split("/")[-2:]),
                "label": tile.label,
                "score": f"{tile.score:.3g}" + (f" = {tile.parts}" if tile.parts else ""),
                "verdict": "anomalous" if tile.is_anomalous else "normal",
            }
            for tile in tiles
        ]
        for kind, tiles in result.galleries.items()
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(values: Mapping[str, Any], metric: str) -> str:
    """Beside a metric: its deviation over seeds, or with one seed its interval; "" if there is neither."""
    if (deviation := values.get(f"{metric}_std")) is not None:
        return f"± {deviation:.3f}"
    interval = values.get(f"{metric}_interval")
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _difference(values: Mapping[str, Any], metric: str) -> dict[str, str] | None:
    """Ours minus the published figure, with a class only where both mean the same; None if nothing is published."""
    theirs = values.get("published")
    if not theirs or values[metric] is None:
        return None
    difference = values[metric] - theirs[metric]
    same = not theirs["difference_of_protocol"]
    return {
        "published": f"{theirs[metric]:.3f}",
        "text": f"{difference:+.3f}",
        "kind": ("above" if difference >= 0 else "below") if same else "other",
    }
