"""The nightly job without Ray: each image is scored by its name, two rows to a file."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stpm import storage
from stpm.data.image_statistics import COMPARED
from stpm.jobs import nightly
from stpm.line import score_nights
from stpm.line.night_folder import NightFolder
from stpm.line.options import MonitoringOptions, NightlyOptions
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, Names
from stpm.scoring import run as run_module
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.progress import Snapshot
from stpm.scoring.run_statistics import RunStatistics, UnfinishedImage
from stpm.scoring.scoring_run import ScoringRun
from tests.conftest import TINY
from tests.datasets import encode_image, make_output, write_task
from tests.models.test_store import save

DATE = datetime.date(2026, 11, 24)


def output_rows(rows: list[dict[str, Any]], model_id: str = "nut-1") -> pa.Table:
    """Make a table of the output's schema: a hash of its path scores an image; one named `bad` has an error."""
    values = make_output(len(rows)).to_pydict()
    for i, row in enumerate(rows):
        path = Path(row["uri"])
        # The path of the test's folder would make other scores in each run of the tests.
        fraction = int(storage.digest("/".join(path.parts[-3:]).encode())[:8], 16) / 2**32
        bad = path.stem == "bad"
        scored = dict.fromkeys(("score", "fine_score", *COMPARED[2:]), 0.5 + fraction)
        scored |= {"threshold": 1.4, "p_value": 1 - fraction, "is_anomalous": fraction > 0.9, "width": 40, "height": 48}
        made = {name: row[name] for name in ("image_id", "uri", "category")}
        made |= {"error_kind": "damaged", "error_message": "cut off"} if bad else scored | {"model_id": model_id}
        for name, value in made.items():
            values[name][i] = value
    return make_output(len(rows), **values)


class Nightly:
    """The job on a folder of dumps, one folder per night, and what it writes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = str(root / "nights")
        self.unreadable: set[str] = set()
        self.starts = 0

    def dump(self, date: datetime.date, *names: str) -> None:
        """Write images of one grey level each to a night's folder."""
        for name in names:
            image = encode_image(np.full((12, 10, 3), len(name), np.uint8))
            storage.publish(f"{self.root}/dump/{date}/nut/{name}.png", image, durable=False)

    def __call__(
        self,
        date: datetime.date = DATE,
        *,
        webhook: str = "",
        nights: int = 30,
        rate: float = 0.01,
        output: OutputOptions = OutputOptions(),  # noqa: B008  it is frozen
        **options: Any,
    ) -> int:
        """Run the job, and return its exit code."""
        values: dict[str, Any] = {
            "models": str(self.root / "models"),
            "images": Names([f"{self.root}/dump/{{date}}"]),
            "out": self.out,
            "date": date.isoformat(),
            "settle": 0,
            "category_from": "{category}/{name}",
        }
        monitoring = MonitoringOptions(webhook=webhook, nights=nights)
        scoring = ScoreOptions(false_alarm_rate=rate)
        return nightly.run_nightly(NightlyOptions(**values | options), monitoring, output, scoring, ClusterOptions())

    def score(self, run: ScoringRun, shards: Any, segment: int, models: Any, progress: Any, _: Any) -> None:
        """Stand for `score_shards`: write the rows, and a summary after each file."""
        self.starts += 1
        for shard in shards:
            written = set() if shard.written is None else set(shard.written.tolist())
            rows = [row for row in storage.read_table(shard.uri).to_pylist() if row["image_id"] not in written]
            for start in range(0, len(rows), 2):
                chunk = [row for row in rows[start : start + 2] if row["uri"] not in self.unreadable]
                failed = [row["uri"] for row in rows[start : start + 2] if row["uri"] in self.unreadable]
                progress.unfinished.extend(UnfinishedImage(name, "unreadable", "denied") for name in failed)
                if chunk:
                    made = pa.concat_tables([output_rows([row], models[row["category"]].model_id) for row in chunk])
                    write_task(run.output, made, abs(chunk[0]["image_id"]), segment)

    def rows(self, date: datetime.date = DATE) -> list[dict[str, Any]]:
        """Return the rows of a night, by URI."""
        files = storage.files(f"{NightFolder.of(self.out, date).uri}/scores")
        rows = [row for uri in files for row in storage.read_table(uri).to_pylist()]
        return sorted(rows, key=lambda row: str(row["uri"]))

    def names(self, date: datetime.date = DATE) -> list[str]:
        """Return the names of the images that have a row, sorted."""
        return [Path(row["uri"]).stem for row in self.rows(date)]


class Progress:
    """Stands for `ProgressReporter`."""

    def __init__(self) -> None:
        self.unfinished: list[UnfinishedImage] = []

    def read(self) -> Snapshot:
        return Snapshot(RunStatistics(), self.unfinished, "", [])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nightly:
    """The job with a model for the category `nut`."""
    save(ModelStore(str(tmp_path / "models")), TINY)
    made = Nightly(tmp_path)
    monkeypatch.setattr(run_module, "connected", nullcontext)
    monkeypatch.setattr(score_nights, "connected", nullcontext)
    monkeypatch.setattr(nightly, "hold_lease", lambda folder, wait: nullcontext())
    monkeypatch.setattr(run_module, "show_scoring_progress", lambda *_, stop_on_failures: nullcontext(Progress()))
    monkeypatch.setattr(run_module, "score_shards", made.score)
    return made


@contextmanager
def cut_off_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Interrupt the block at the write or removal after this number of them; yield a function that counts them."""
    done = 0

    def counted(act: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Any, **options: Any) -> None:
            nonlocal done
            if done == steps:
                raise KeyboardInterrupt
            done += 1
            act(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("publish", "remove"):
            patch.setattr(storage, name, counted(getattr(storage, name)))
        yield lambda: done
