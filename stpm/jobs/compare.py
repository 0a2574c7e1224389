"""The compare job: what a person looks at before a new model becomes current. It decides nothing, and needs no Ray."""

from __future__ import annotations

import logging

from tabulate import tabulate

from stpm import storage
from stpm.console import log_lines
from stpm.errors import ConfigError, with_remedy
from stpm.evaluation.compare import compare, read_run
from stpm.evaluation.gallery import draw_images
from stpm.evaluation.options import CompareOptions
from stpm.exit_codes import ALL_DONE
from stpm.pages import render

log = logging.getLogger(__name__)


def run_compare(options: CompareOptions) -> int:
    """Run the compare job, and return its exit code.

    Raises:
        DataError, ModelError: if a run or one of its models cannot be read, or both have no image in common.
        ConfigError: if both are one.
    """
    folders, page = [storage.absolute(folder) for folder in options.run], storage.absolute(options.page)
    if folders[0] == folders[1]:
        raise ConfigError(f"A and B are both {folders[0]}; give two runs")
    with with_remedy("score its images again, by the score job with --fresh"):
        # One store may be that of both.
        runs = [read_run(*each) for each in zip(folders, [*options.models * 2, "", ""], strict=False)]
        comparisons, remarks = compare(*runs)
        log_lines(tabulate([row for each in comparisons for row in each.rows], "keys", disable_numparse=True))
        # Each image by A and by B.
        drawn = {
            (each.category, title): [draw_images(*run.models[each.category], uris) for run in runs]
            for each in comparisons
            for title, uris in each.changes.items()
        }
    for each in comparisons:
        log.info(f"{each.category}: {each.headline}", extra={"category": each.category})
    for line in remarks:
        log.info(line)
    values = {"comparisons": comparisons, "remarks": remarks, "runs": runs, "drawn": drawn}
    storage.publish(page, render("evaluation/compare.html", **values).encode())
    log.info(f"A is {folders[0]}, B is {folders[1]}; pictures of where they differ are in {page}")
    return ALL_DONE
