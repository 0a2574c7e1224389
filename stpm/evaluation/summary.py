"""The tables of a report, for terminal, Markdown and page, and its headline.

A cell is text; in a second line, which only the page shows, it may have an interval.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tabulate import tabulate

from stpm.metrics.category_metrics import METRICS

# What report.json says of a category or a defect type; of all: their means, and the sums of counts.
Values = Mapping[str, Any]
Row = dict[str, str]

_FOUND, _ALARMS = ("found_count", "defect_count"), ("false_alarm_count", "good_count")


def summary_rows(rows: Mapping[str, Values]) -> list[Row]:
    """Say what is found in each category, at which threshold, and what that promises."""
    return [
        {
            "category": name,
            **{METRICS[metric]: _metric(metric, values) for metric in ("image_auroc", "pixel_auroc", "pixel_aupro")},
            "defects found": _share(*_FOUND, "image_recall", values),
            "false alarms": _share(*_ALARMS, "image_false_alarm_rate", values),
            "threshold": _optional("{:.4g}", values.get("threshold")),
            "which is the": values.get("threshold_source", ""),
            "expected alarms": _optional("{:.2%}", values.get("expected_false_alarm_rate")),
            "at most (90%)": _optional("{:.2%}", values.get("false_alarm_bound")),
        }
        for name, values in rows.items()
    ]


def metric_rows(title: str, rows: Mapping[str, Values]) -> list[Row]:
    """Give all metrics of each category or defect type."""
    shown = [name for name in METRICS if name not in ("image_recall", "image_false_alarm_rate")]
    return [
        {
            title: name,
            "found": _share(*_FOUND, "image_recall", values),
            **{METRICS[metric]: _metric(metric, values) for metric in shown},
        }
        for name, values in rows.items()
    ]


def write_table(rows: Sequence[Row], tablefmt: Literal["simple", "pipe"]) -> str:
    """Write a table for a terminal, or as Markdown, which is `pipe`; "" without rows."""
    if not rows:
        return ""
    lines = [[cell.partition("\n")[0] for cell in row.values()] for row in rows]
    head = ["\n".join(textwrap.wrap(title, 10)) for title in rows[0]]
    if tablefmt == "pipe":
        head, lines = list(rows[0]), [[escape_markdown(cell) for cell in line] for line in lines]
    align = ("left", *("right",) * (len(head) - 1))
    return str(tabulate(lines, head, tablefmt, disable_numparse=True, colalign=align))


def headline(categories: Mapping[str, Values], every: Values) -> str:
    """Say in a sentence what was found, and in which category least."""

    def worst(count: str, of: str, sign: int, word: str) -> str:
        shares = {name: sign * values[count] / values[of] for name, values in categories.items() if values[of]}
        if len({*shares.values()}) < 2:
            return ""
        name = min(shares, key=lambda name: shares[name])
        return f" ({word} of {name}: {_of(count, of, categories[name])})"

    found, alarms = _of(*_FOUND, every), _of(*_ALARMS, every)
    least, most = worst(*_FOUND, 1, "fewest"), worst(*_ALARMS, -1, "most")
    return f"{found} defects are found{least}, and {alarms} good images are false alarms{most}."


def escape_markdown(text: str) -> str:
    """Escape the special characters of Markdown's tables and of HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#&" else " " if c in "\r\n" else c for c in text)


def _metric(name: str, values: Values) -> str:
    value, std, interval = (values.get(f"{name}{suffix}") for suffix in ("", "_std", "_interval"))
    if value is None:
        return "–"
    between = f" ± {std:.4f}" if std is not None else "\n{:.3f} to {:.3f}".format(*interval) if interval else ""
    return f"{value:.4f}{between}"


def _share(count: str, of: str, metric: str, values: Values) -> str:
    return _of(count, of, values) + _optional("\n{0[0]:.0%} to {0[1]:.0%}", values.get(f"{metric}_interval"))


def _optional(template: str, value: object) -> str:
    return "" if value is None else template.format(value)


def _of(count: str, of: str, values: Values) -> str:
    """Write a count, which as a mean over seeds may be broken, with its denominator."""
    return f"{round(values[count], 1):,} of {values[of]:,}"
