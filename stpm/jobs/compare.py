"""The compare job: what a person looks at before a new model becomes current. It decides nothing, and starts no Ray."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from stpm import storage
from stpm.console import log_lines
from stpm.errors import with_remedy
from stpm.evaluation.compare import Comparison, Run, compare, read_run
from stpm.evaluation.gallery import draw_images
from stpm.evaluation.options import CompareOptions
from stpm.evaluation.summary import write_table
from stpm.exit_codes import ALL_DONE
from stpm.pages import render
from stpm.pages.tiles import Tile

# Pictures of each list on the page.
_MAX_TILES = 60

log = logging.getLogger(__name__)


def run_compare(options: CompareOptions) -> int:
    """Run the compare job, and return its exit code.

    Raises:
        DataError, ModelError: if a run or one of its models cannot be read, or both have no image in common.
    """
    folders = [storage.absolute(folder) for folder in options.run]
    with with_remedy("score its images again, by the score job with --fresh"):
        runs = [read_run(*each) for each in zip(folders, [*options.models * 2, "", ""], strict=False)]
        comparisons, every, remarks = compare(*runs)
        shown = [(each, _draw_changes(each, runs)) for each in comparisons]
    rows = [row for each in dict.fromkeys([*comparisons, every]) for row in each.rows]
    log_lines(write_table(rows, "simple"))
    for line in [*(f"{each.headline}. {each.agreement}" for each in comparisons), *remarks]:
        log.info(line)
    page = storage.absolute(options.page)
    values = {"headline": every.headline, "rows": rows, "remarks": remarks, "shown": shown, "runs": runs}
    storage.publish(page, render("evaluation/compare.html", **values).encode())
    log.info(f"A is {folders[0]}, and B {folders[1]}; pictures of where they differ are in {page}")
    return ALL_DONE


def _draw_changes(comparison: Comparison, runs: Sequence[Run]) -> dict[str, tuple[int, list[tuple[Tile, ...]]]]:
    """Draw the first images of each list, by A and by B, beside the length of the list."""
    drawn = {}
    for title, places in comparison.changes.items():
        uris = [comparison.uris[i] for i in places[:_MAX_TILES]]
        models = [run.models[comparison.category] for run in runs]
        tiles = [draw_images(scored, record.heatmap_scale, uris) for scored, record in models]
        drawn[title] = len(places), [tuple(each[uri] for each in tiles) for uri in uris]
    return drawn
