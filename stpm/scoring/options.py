"""Options of scoring. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stpm.options import WAIT_HELP, Export, Heatmaps, Names, Options, check_export, option
from stpm.scoring.inputs.category_rule import CategoryRule

HeatmapsIn = Literal["files", "parquet"]

IMAGE_SECONDS = 300.0

CATEGORY_HELP = "category of each image for which no table names one: the model that scores it"
CATEGORY_FROM_HELP = "read each image's category from the last parts of its path, such as {category}/{date}/{name}"
ALLOW_HELP = (
    "prefixes that the URIs in a table may have, instead of the table's own bucket or folder, separated by commas"
)
_DAY = 24 * 3600


@dataclass(frozen=True)
class CollectionOptions(Options):
    """The images to score, the models that score them, and the run folder."""

    models: str = option("", "model store: a folder or a URI", required=True)
    images: Names = option(
        Names(),
        "what to score, separated by commas: folders or prefixes (searched at any depth for images and .tar "
        "archives), globs, .tar archives, tables (.parquet, .csv, .jsonl or .ndjson with a column `uri`; other columns "
        "are copied to the output), or .parquet files with the images themselves in a column `image` or `bytes`. The "
        "name of an existing file or folder is never read as a glob; write [[], [*] and [?] for the characters "
        "themselves",
        required=True,
    )
    out: str = option("", "run folder for scores/*.parquet, heatmaps/ and run.json: a folder or a URI", required=True)
    category: str = option("", CATEGORY_HELP)
    category_from: str = option("", CATEGORY_FROM_HELP)
    allow: Names = option(Names(), ALLOW_HELP)
    top: int = option(50, "images on triage.html, the page of the most anomalous ones; 0: no page", minimum=0)
    coco: bool = option(
        False, "write alarms.coco.json: the anomalous images and their regions, which labelling tools import"
    )
    fresh: bool = option(
        False, "remove what earlier runs wrote to the run folder, and score all images again with the current models"
    )
    wait: bool = option(False, WAIT_HELP)
    max_error_rate: float = option(
        0.01, "fraction of images, 0 to 1, that may be errors before the exit code is 2", minimum=0, maximum=1
    )
    export: Export = option("none", "also write the rows, when all are there, as rows.csv or rows.xlsx")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_export(self.export)
        CategoryRule(self.category, self.category_from)


@dataclass(frozen=True)
class OutputOptions(Options):
    """What a run writes for each image besides its score."""

    heatmaps: Heatmaps = option("all", "images that get a heatmap, as palette PNG: all, anomalous or none")
    heatmaps_in: HeatmapsIn = option(
        "files",
        "files: a PNG per heatmap; parquet: its bytes in a column of the Parquet files, better for millions of images",
    )
    overlay: bool = option(
        False, "write beside each heatmap a JPEG of the image with the heatmap drawn over it, in its own proportions"
    )
    masks: bool = option(
        False, "write a PNG of 0 and 255, in the size of the heatmap, of the regions of each image that has any"
    )
    raw_maps: bool = option(
        False,
        "keep each anomaly map as float32 in the Parquet files: 4 bytes for each input pixel, 0.6 MB an image with "
        "preset default",
    )


@dataclass(frozen=True)
class ScoreOptions(Options):
    """How images are scored."""

    false_alarm_rate: float = option(
        0.01,
        "fraction of good images that may be called anomalous, 0 to 1; sets the threshold from held-out good images",
        above=0,
        below=1,
    )
    region_rate: float = option(
        0.1,
        "fraction of good images that may have any region, 0 to 1; sets the threshold of pixels, and decides no alarm",
        above=0,
        below=1,
    )
    scoring_batch_size: int = option(
        0,
        "images per forward pass; 0: 16 on a CPU, and on a GPU doubled while that is faster. Halved after running out "
        "of memory",
        minimum=0,
    )
    model_ram_gib: float = option(
        1.0,
        "GiB of RAM, or of GPU RAM, for the models and teachers that a scorer keeps loaded; beyond it the least "
        "recently used ones are dropped, and loaded again when needed",
        minimum=0,
    )
    image_seconds: float = option(
        IMAGE_SECONDS,
        "seconds that fetching one image may take, and again decoding it. An image that is not fetched in time is "
        "tried again by the next run; one that is not decoded in time becomes a row with an error",
        above=0,
        maximum=_DAY,
    )
    accept_errors: bool = option(
        False,
        "write a row with an error for each image that failed because of storage, a model or a device, instead of "
        "trying it again in the next run; and do not stop when most images fail",
    )
    scorers: int = option(0, "actors that score; 0: one per GPU, or without GPUs one per CPU core", minimum=0)
    rows_per_file: int = option(
        512,
        "rows that a task collects, at least, before it writes a Parquet file; with --raw-maps at most 64",
        minimum=1,
    )
    segment_rows: int = option(
        2_000_000,
        "images that are planned, scored and committed at a time, at most; with more, scorers start less often, and "
        "the driver takes more RAM; a resumed run keeps the value that it began with",
        minimum=1,
    )
