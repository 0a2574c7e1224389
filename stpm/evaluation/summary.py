"""What a report says first: its headline, and tables for terminal, Markdown and page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from tabulate import tabulate

from stpm.metrics.category_metrics import METRICS

# What report.json says of a category or a defect type; of all: their means, and the sums of counts.
Values = Mapping[str, Any]


class Cell(NamedTuple):
    """A cell: its text; its spread over seeds, which begins with ±, or interval, for the page alone; what sorts it."""

    text: str
    note: str = ""
    key: Any = None


Column = Callable[[Values], Cell]


@dataclass(frozen=True)
class Table:
    """A table: titles, rows of as many cells, and a last row of means and sums, or none."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell]

    def text(self, tablefmt: Literal["simple", "pipe"]) -> str:
        """Write the table for a terminal, or as Markdown, which is `pipe`; "" without rows."""
        if not self.rows:
            return ""
        is_markdown = tablefmt == "pipe"
        lines = [
            [f"{cell.text} {cell.note}" if cell.note.startswith("±") else cell.text for cell in cells]
            for cells in (*self.rows, self.foot)
        ]
        head = self.head if is_markdown else ["\n".join(textwrap.wrap(title, 10)) for title in self.head]
        shown = [[escape_markdown(text) for text in line] for line in lines] if is_markdown else lines
        align = ("left", *("right",) * (len(head) - 1))
        return str(tabulate(shown, head, tablefmt, disable_numparse=True, colalign=align))


def summary_table(categories: Mapping[str, Values], every: Values) -> Table:
    """Make the table of what the models find, and of the thresholds that they find it at."""
    columns: dict[str, Column] = {
        "image AUROC": partial(_metric, "image_auroc"),
        "pixel AUROC": partial(_metric, "pixel_auroc"),
        "AUPRO": partial(_metric, "pixel_aupro"),
        "defects found": _found,
        "false alarms": _false_alarms,
        "threshold": partial(_value, "threshold", "{:.4g}".format),
        "which is the": partial(_value, "threshold_source", str),
        "false alarms to expect": partial(_value, "expected_false_alarm_rate", _percent),
        "at most, with 90 %": partial(_value, "false_alarm_bound", _percent),
    }
    return _table("category", columns, categories, every)


def metrics_table(title: str, rows: Mapping[str, Values], every: Values | None = None) -> Table:
    """Make the table of all metrics of categories or defect types."""
    columns: dict[str, Column] = {
        "found": _found,
        **{
            METRICS[name]: partial(_metric, name)
            for name in METRICS
            if name not in ("image_recall", "image_false_alarm_rate")
        },
    }
    return _table(title, columns, rows, every)


def headline(categories: Mapping[str, Values], every: Values) -> tuple[str, dict[str, str]]:
    """Say in a sentence what was found, and where least; and give the four numbers that matter, by name."""
    if not categories:
        return "Nothing was evaluated.", {}
    found, alarms = _found(every), _false_alarms(every)
    least, most = _extreme(categories, _found, "fewest"), _extreme(categories, _false_alarms, "most")
    parts = (
        f"{found.text} defects are found{least}" if every["defect_count"] else "no defect was tested",
        f"{alarms.text} good images are false alarms{most}" if every["good_count"] else "no good image was tested",
    )
    expected = every["expected_false_alarm_rate"]
    numbers = {
        "defects found": found.text,
        "false alarms of good images": alarms.text,
        "false alarms to expect of 1,000 good images": "–" if expected is None else f"{1000 * expected:.3g}",
        "image AUROC": _metric("image_auroc", every).text,
    }
    sentence = " and ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}.", numbers


def _extreme(categories: Mapping[str, Values], make: Column, word: Literal["fewest", "most"]) -> str:
    """Name the category with the lowest or the highest share, if there are several shares."""
    shares = {name: cell for name, values in categories.items() if (cell := make(values)).key is not None}
    ranked = sorted(shares, key=lambda name: shares[name].key or 0.0, reverse=word == "most")
    if not ranked or shares[ranked[0]].key == shares[ranked[-1]].key:
        return ""
    return f" ({word} of {ranked[0]}: {shares[ranked[0]].text})"


def escape_markdown(text: str) -> str:
    """Escape the special characters of Markdown's tables and of HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#&" else " " if c in "\r\n" else c for c in text)


def _table(title: str, columns: Mapping[str, Column], rows: Mapping[str, Values], every: Values | None) -> Table:
    def cells(name: str, values: Values) -> list[Cell]:
        return [Cell(name, key=name), *(make(values) for make in columns.values())]

    foot = cells("mean, sum", every) if every else ()
    return Table((title, *columns), [cells(name, values) for name, values in rows.items()], foot)


def _found(values: Values) -> Cell:
    return _fraction("found_count", "defect_count", "image_recall", values)


def _false_alarms(values: Values) -> Cell:
    return _fraction("false_alarm_count", "good_count", "image_false_alarm_rate", values)


def _metric(name: str, values: Values) -> Cell:
    """Show a metric with its standard deviation over seeds or, with one seed, its interval."""
    value, std, interval = (values.get(f"{name}{suffix}") for suffix in ("", "_std", "_interval"))
    if value is None:
        return Cell("–")
    note = f"± {std:.4f}" if std is not None else "{:.3f} to {:.3f}".format(*interval) if interval else ""
    return Cell(f"{value:.4f}", note, value)


def _fraction(name: str, of: str, metric: str, values: Values) -> Cell:
    """Show a count as one of all, and in percent with its interval."""
    count, total = values[name], values[of]
    if not total:
        return Cell("–")
    interval = values.get(f"{metric}_interval")
    between = " ({:.0f} to {:.0f} %)".format(*(100 * end for end in interval)) if interval else ""
    return Cell(f"{_write_count(count)} of {total:,}", f"{_percent(count / total)}{between}", count / total)


def _value(name: str, write: Callable[[Any], str], values: Values) -> Cell:
    """Show a value that not all images have in common: empty in the last row, and a dash where it is not known."""
    value = values.get(name)
    return Cell("–" if name in values else "") if value is None else Cell(write(value), key=value)


def _write_count(count: float) -> str:
    """Write a count, which as a mean over seeds may be broken."""
    return f"{count:,.1f}".removesuffix(".0")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
