"""triage.html: the most anomalous images of a run on one static page, for the person who inspects them."""

from __future__ import annotations

from itertools import chain, islice

from stpm import storage
from stpm.pages import render
from stpm.pages.tiles import Tile, draw_tile
from stpm.scoring.kinds import Row, group_alarms
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.scoring_run import ModelRecords

# Maximum pixels of a picture's shorter and longer side: the page shows it large at a click.
_SIDES = (512, 1024)
# Pictures of a kind that are not behind a click.
_SHOWN = 4
# Pictures that are drawn at the same time.
THREADS = 8


def write_triage(output: RunOutput, max_images: int, models: ModelRecords) -> None:
    """Write the page, with its pictures embedded, to the state folder of a run that has scored all images."""

    def draw(row: Row) -> Tile:
        model = models[row["category"]]
        return draw_tile(row, output.folder, model.preprocessing, model.heatmap_scale, _SIDES)

    groups = group_alarms(most_anomalous(output, max_images))
    drawn = iter(storage.in_parallel(draw, list(chain.from_iterable(groups)), THREADS))
    kinds = [list(islice(drawn, len(group))) for group in groups if len(group) > 1]
    values = {"folder": output.folder, "models": models}
    page = render("scoring/triage.html", kinds=kinds, others=list(drawn), shown=_SHOWN, **values)
    storage.publish(output.triage, page.encode())
