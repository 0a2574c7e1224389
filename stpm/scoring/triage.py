"""triage.html: the most anomalous images of a run on one static page, for the person who inspects them."""

from __future__ import annotations

from itertools import chain, islice

from PIL import Image

from stpm import storage
from stpm.data.encode import encode_jpeg
from stpm.data.heatmaps import overlay, read_shown
from stpm.method.preprocessing import Preprocessing
from stpm.pages import data_uri, render
from stpm.pages.tiles import Tile, draw_tile
from stpm.scoring.kinds import Row, group_alarms
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.scoring_run import ModelRecords

# Maximum pixels of a picture's shorter and longer side: on the page, which shows it large at a click; in a list.
_PAGE_SIDES, _LIST_SIDES = (512, 1024), (256, 1024)
# Pictures of a kind that are not behind a click.
_SHOWN = 4
# Pictures that are drawn at the same time.
THREADS = 8


def write_triage(output: RunOutput, max_images: int, models: ModelRecords) -> None:
    """Write the page, with its pictures embedded, to the state folder of a run that has scored all images."""

    def draw(row: Row) -> Tile:
        model = models[row["category"]]
        return draw_tile(row, output.folder, model.preprocessing, model.heatmap_scale, _PAGE_SIDES)

    groups = group_alarms(most_anomalous(output, max_images))
    drawn = iter(storage.in_parallel(draw, list(chain.from_iterable(groups)), THREADS))
    kinds = [list(islice(drawn, len(group))) for group in groups if len(group) > 1]
    values = {"folder": output.folder, "models": models}
    page = render("scoring/triage.html", kinds=kinds, others=list(drawn), shown=_SHOWN, **values)
    storage.publish(output.triage, page.encode())


def picture(output: RunOutput, row: Row, preprocessing: Preprocessing) -> str:
    """Draw an image under its heatmap, if there is one, as a data URI; return "" if it cannot be read."""
    if (shown := read_shown(row, output.folder, preprocessing, *_LIST_SIDES)) is None:
        return ""
    pixels, levels = shown
    return data_uri("jpeg", encode_jpeg(Image.fromarray(pixels if levels is None else overlay(pixels, levels))))
