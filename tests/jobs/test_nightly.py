"""The nightly job without Ray: what is scored when, and that a kill at any step changes nothing."""

import dataclasses
import datetime
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import jsonschema
import pyarrow as pa
import pytest

from stpm import storage
from stpm.errors import ModelUnreadableError, RunInterruptedError
from stpm.jobs import nightly
from stpm.line import night_record, score_nights
from stpm.line.night import Night
from stpm.line.night_folder import NightFolder
from stpm.line.score_nights import NightlyJob
from stpm.models.store import ModelStore
from stpm.scoring import run as run_module
from stpm.scoring.options import OutputOptions
from stpm.scoring.run_state import RunState
from tests.conftest import TINY
from tests.line.nightly_runs import DATE, Nightly, cut_off_after, job
from tests.line.test_nightly_json import SCHEMA
from tests.models.test_store import save

__all__ = ["job"]

BEFORE = DATE - datetime.timedelta(days=1)
AFTER = DATE + datetime.timedelta(days=1)
# How a problem of the night before ends.
OVER = "--date 2026-11-23 --fresh, which removes the night's rows and scores it again"


def record(job: Nightly, date: datetime.date = DATE) -> Night:
    found = NightFolder.of(job.out, date).read()
    assert found
    return found


def test_a_night_is_scored_and_reported_and_too_many_errors_are_exit_code_2(
    job: Nightly, caplog: pytest.LogCaptureFixture
) -> None:
    job.dump(DATE, "a", "b", "c", "bad")
    assert job(max_error_rate=0.2) == 2
    message = "1 of 4 images are errors, more than --max-error-rate 0.2: see error_kind in the rows"
    assert ("ERROR", message) in [(each.levelname, each.getMessage()) for each in caplog.records]
    assert "--false-alarm-rate 0.01 needs 99 good images to calibrate on: nut calibrates on " in caplog.text
    caplog.clear()
    assert job(max_error_rate=0.25) == 0
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
    assert job.names() == ["a", "b", "bad", "c"]
    night = record(job)
    assert (night.total.images, night.total.scored, night.total.errors) == (4, 3, {"damaged": 1})
    assert night.categories["nut"].images == 4
    assert [example["message"] for example in night.error_examples] == ["cut off"]
    values = json.loads(storage.read(f"{job.out}/nightly.json"))
    assert [(shown["date"], shown["images"]) for shown in values["nights"]] == [("2026-11-24", 4)]
    jsonschema.validate(values, SCHEMA, jsonschema.Draft202012Validator)
    html = storage.read(f"{job.out}/nightly.html").decode()
    assert "Night of <time>2026-11-24</time>" in html
    ranked = [row["uri"] for row in sorted(job.rows(), key=lambda row: -(row["score"] or 0))[:3]]
    assert re.findall(r'role="img" aria-label="(/.*?)"><g', html) == ranked
    # No folder is made for nights that have nothing.
    assert [folder.date for folder in NightFolder.find_all(job.out)] == [DATE]


def test_a_night_without_new_images_starts_no_scoring(job: Nightly, monkeypatch: pytest.MonkeyPatch) -> None:
    job.dump(DATE, "a", "b")
    assert job() == 0
    before = job.rows(), record(job)
    monkeypatch.setattr(score_nights, "connected", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(night_record, "make_record", lambda *_: pytest.fail("rows were read"))
    assert job() == 0
    assert (job.rows(), record(job)) == before
    assert job.starts == 1
    # Nor do images that no model can score.
    job.dump(DATE, "c")
    assert job(models="/nowhere") == 2
    assert record(job).problem == "/nowhere: no models here; fit them first, or see --models"


def test_late_files_are_scored_into_their_night_by_a_run_of_their_own(job: Nightly) -> None:
    job.dump(BEFORE, "a", "b")
    assert job(BEFORE) == 0
    first = job.rows(BEFORE)
    job.dump(BEFORE, "late")
    job.dump(DATE, "c")
    assert job(DATE, rate=0.05, output=OutputOptions(heatmaps="none")) == 0
    assert job.names(BEFORE) == ["a", "b", "late"]
    assert job.names(DATE) == ["c"]
    assert [row for row in job.rows(BEFORE) if not row["uri"].endswith("/late.png")] == first
    night = record(job, BEFORE)
    assert (night.runs, night.total.images) == (("001", "002"), 3)
    # Its verdict follows the first run, and each run its own options.
    config = json.loads(storage.read(NightFolder.of(job.out, BEFORE).outputs()[1].state.uri))["config"]
    assert (config["output"]["heatmaps"], config["false_alarm_rate"]) == ("none", 0.05)
    assert night.categories["nut"].false_alarm_rate == 0.01
    html = storage.read(f"{job.out}/nightly.html").decode()
    for link in re.findall(r'href="(date=[^"]*html)"', html):
        assert storage.exists(f"{job.out}/{link}")
    # A night that is older than --look-back is not listed.
    job.dump(BEFORE, "later")
    assert job(DATE, look_back=0) == 0
    assert job.names(BEFORE) == ["a", "b", "late"]


def test_missed_nights_are_caught_up_and_all_nights_are_one_table(job: Nightly) -> None:
    job.dump(BEFORE, "a", "c")
    job.dump(DATE, "b")
    assert job(AFTER) == 3
    assert (job.names(BEFORE), job.names(DATE)) == (["a", "c"], ["b"])
    category = record(job, AFTER).categories["nut"]
    assert (category.images, category.level) == (0, "fine")
    rows = duckdb.read_parquet(f"{job.out}/date=*/scores/*.parquet", hive_partitioning=True)
    assert sorted(rows.aggregate("date, count(*)").fetchall()) == [(BEFORE, 2), (DATE, 1)]


def test_a_new_model_scores_what_is_new_and_leaves_the_rows_that_are_there(job: Nightly) -> None:
    job.dump(DATE, "a")
    assert job() == 0
    (first,) = {row["model_id"] for row in job.rows()}
    second = save(ModelStore(str(job.root / "models")), dataclasses.replace(TINY, seed=7)).model_id
    job.dump(DATE, "b", "c")
    assert job() == 0
    assert {Path(row["uri"]).stem: row["model_id"] for row in job.rows()} == {"a": first, "b": second, "c": second}
    assert record(job).categories["nut"].model_id == second
    assert job(fresh=True) == 0
    assert {row["model_id"] for row in job.rows()} == {second}
    assert record(job).runs == ("001",)


def test_unreadable_images_are_tried_again_and_hold_up_none(job: Nightly, caplog: pytest.LogCaptureFixture) -> None:
    job.dump(BEFORE, "a", "b", "denied")
    job.unreadable = {f"{job.root}/dump/{BEFORE}/nut/denied.png"}
    assert job(BEFORE) == 2
    assert (job.names(BEFORE), record(job, BEFORE).unfinished) == (["a", "b"], 1)
    job.dump(BEFORE, "late")
    assert job(BEFORE) == 2
    assert (job.names(BEFORE), record(job, BEFORE).unfinished) == (["a", "b", "late"], 1)
    job.unreadable = set()
    job.dump(DATE, "c")
    assert job(look_back=0) == 0
    assert "1 images of 2026-11-23 have no row, and --look-back does not reach it" in caplog.text
    assert job() == 0
    assert (job.names(BEFORE), record(job, BEFORE).unfinished) == (["a", "b", "denied", "late"], 0)


def test_a_file_that_is_being_copied_is_left_to_the_next_start(job: Nightly, caplog: pytest.LogCaptureFixture) -> None:
    job.dump(DATE, "a", "copied")
    copied = Path(f"{job.root}/dump/{DATE}/nut/copied.png")
    os.utime(copied.with_name("a.png"), (0, 0))
    job(settle=60)
    assert job.names() == ["a"]
    assert f"modified less than 60 s ago and may still be being written: {copied}" in caplog.text
    caplog.clear()
    os.utime(copied, (0, 0))
    job(settle=60)
    assert job.names() == ["a", "copied"]
    assert "to the next start" not in caplog.text


def test_a_problem_of_one_night_stops_no_other(job: Nightly) -> None:
    job.dump(BEFORE, "a")
    assert job(BEFORE) == 0
    judged = record(job, BEFORE)
    # Options of an unfinished run with rows may not change.
    job.dump(BEFORE, "denied", "c")
    job.unreadable = {f"{job.root}/dump/{BEFORE}/nut/denied.png"}
    assert job(BEFORE) == 2
    job.dump(DATE, "b")
    assert job(DATE, category_from="", category="nut") == 2
    assert job.names(DATE) == ["b"]
    problem = record(job, BEFORE).problem
    assert "holds the rows of another run: category was '' and is 'nut'" in problem
    assert problem.endswith(f"; run the same command with {OVER}")
    assert record(job, BEFORE).categories["nut"].images == judged.total.images + 1
    assert problem in storage.read(f"{job.out}/nightly.html").decode().replace("&#39;", "'")


def test_a_damaged_night_is_named_and_written_over_only_by_fresh_as_its_problem_says(job: Nightly) -> None:
    job.dump(DATE, "a", "b")
    assert job() == 0
    uri = f"{NightFolder.of(job.out, DATE).uri}/night.json"
    storage.publish(uri, b"{}")
    assert job() == 3
    assert storage.read(uri) == b"{}"
    html = storage.read(f"{job.out}/nightly.html").decode()
    assert "night.json is not a record of a night" in html
    assert "run the same command with --date 2026-11-24 --fresh" in html
    assert "--out" not in html
    assert job(fresh=True) == 0
    assert (job.names(), record(job).total.images) == (["a", "b"], 2)
    # The folder says the date.
    storage.publish(uri, storage.read(uri).replace(b'"date": "2026-11-24"', b'"date": "tonight"'))
    assert job() == 0
    assert record(job).date == "2026-11-24"


@pytest.mark.parametrize(
    ("cause", "problem"),
    [
        ("no images", "there are no images in "),
        ("no model", "no model for category 'botle'"),
        ("a damaged model", "model.json"),
        ("storage fails after the first images", "503 Slow Down"),
    ],
)
def test_fresh_keeps_the_rows_where_they_cannot_be_made_again(
    job: Nightly, cause: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.dump(DATE, "a", "b")
    assert job() == 0
    before = job.rows()
    options = {}
    if cause == "no images":
        shutil.move(job.root / "dump", job.root / "unmounted")
    elif cause == "no model":
        options = {"category": "botle", "category_from": ""}
    elif cause == "a damaged model":
        (uri,) = (uri for uri in storage.files(f"{job.root}/models/nut") if uri.endswith("/model.json"))
        storage.publish(uri, b"{}")
    else:
        list_images = score_nights.image_rows

        def rows(*arguments: Any, **settle: Any) -> Iterator[pa.Table]:
            yield from list_images(*arguments, **settle)
            raise OSError("503 Slow Down")

        monkeypatch.setattr(score_nights, "image_rows", rows)
    assert job(fresh=True, **options) == 2
    assert job.rows() == before
    assert problem in record(job).problem
    assert "503" in problem or "--fresh left the rows as they are" in record(job).problem
    # It was judged before.
    assert "50 % of the images could be alarms by chance" in storage.read(f"{job.out}/nightly.html").decode()


def test_a_day_with_nothing_to_tell_becomes_no_night(job: Nightly, caplog: pytest.LogCaptureFixture) -> None:
    assert job() == 3
    # Nights before the first one may never have been.
    assert [f"{DATE}: no images here" in message for message in caplog.messages if "no images" in message] == [True]
    job.dump(DATE, "a")
    assert job() == 0
    assert job(datetime.date(2016, 11, 24)) == 3
    assert [folder.date for folder in NightFolder.find_all(job.out)] == [DATE]


def test_a_night_is_judged_once_storage_gives_its_models(job: Nightly, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> None:
        raise ModelUnreadableError("s3://plant/models: 503 Slow Down")

    job.dump(DATE, "a", "b", "c")
    with monkeypatch.context() as patch:
        patch.setattr(ModelStore, "image_statistics", unreadable)
        assert job() == 2
    night = record(job)
    assert (night.total.images, night.problem) == (3, "s3://plant/models: 503 Slow Down")
    assert night.categories["nut"].level == "not judged"
    assert job() == 0
    assert record(job).problem == ""
    assert record(job).categories["nut"].level == "cannot tell"


def test_after_a_cut_off_the_other_nights_have_a_problem_and_are_not_judged(
    job: Nightly, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise RunInterruptedError("a node was lost")

    job.dump(BEFORE, "a", "b", "c", "d")
    job.unreadable = {f"{job.root}/dump/{BEFORE}/nut/{name}.png" for name in "abc"}
    assert job(BEFORE) == 2
    job.unreadable = set()
    job.dump(DATE, "e")
    monkeypatch.setattr(run_module, "score_shards", cut_off)
    assert job(DATE) == 3
    assert record(job).problem == "a node was lost"
    before = record(job, BEFORE)
    assert before.problem == "not looked at, because 2026-11-24 was interrupted: a node was lost"
    assert (before.unfinished, before.categories["nut"].level) == (3, "not judged")
    assert len(NightFolder.find_all(job.out)) == 2
    missed = "2026-11-23, 2026-11-22, 2026-11-21: not looked at, because 2026-11-24 was interrupted: a node was lost"
    assert missed in caplog.messages


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scores/", b"PAR1 damaged"),
        ("runs/001/manifest/000000-000000.parquet", b"PAR1 damaged"),
        ("runs/001/manifest/000000-000000.parquet", storage.encode_parquet(pa.table({"x": [1]}))),
        ("runs/001/manifest/manifest.json", b""),
        ("runs/001/run.json", b"[" * 200_000),
    ],
)
def test_a_damaged_file_of_one_night_is_its_problem_alone(job: Nightly, file: str, content: bytes) -> None:
    job.dump(BEFORE, "a", "b")
    assert job(BEFORE) == 0
    job.dump(BEFORE, "late")
    job.dump(DATE, "c")
    uri = next(uri for uri in storage.files(f"{job.out}/date={BEFORE}") if f"/{file}" in uri)
    # Or a list of images that names no category.
    storage.publish(uri, content or re.sub(rb'{"nut": ?[0-9]+}', b"{}", storage.read(uri)), durable=False)
    assert job(DATE) == 2
    assert record(job).total.images == 1
    problem = json.loads(storage.read(f"{job.out}/nightly.json"))["nights"][0]["problem"]
    assert uri.removeprefix("/") in problem
    assert problem.endswith(f" run the same command with {OVER}")


def test_the_page_is_made_where_images_can_no_longer_be_shown(job: Nightly, caplog: pytest.LogCaptureFixture) -> None:
    job.dump(DATE, "a", "b")
    assert job() == 0
    storage.remove(f"{job.root}/models/nut")
    assert job() == 0
    assert storage.read(f"{job.out}/nightly.html").decode().count("the image can no longer be read") == 2
    uri = storage.files(f"{job.out}/date={DATE}/scores")[0]
    storage.publish(uri, b"PAR1 damaged", durable=False)
    assert job() == 0
    assert f"{uri} is damaged" in caplog.text
    assert "No image is shown" in storage.read(f"{job.out}/nightly.html").decode()


def test_storage_that_fails_for_one_night_is_its_problem(job: Nightly, monkeypatch: pytest.MonkeyPatch) -> None:
    def summarize(options: NightlyJob, folder: NightFolder, *others: Any) -> Night:
        if folder.date == BEFORE:
            raise OSError("503 Slow Down \udcff")
        return plain(options, folder, *others)

    plain = night_record.make_record
    job.dump(BEFORE, "a")
    job.dump(DATE, "b")
    monkeypatch.setattr(night_record, "make_record", summarize)
    assert job(DATE) == 2
    assert record(job).total.images == 1
    # A name that is not UTF-8 fits on the page.
    assert "503 Slow Down %FF" in storage.read(f"{job.out}/nightly.html").decode()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_kill_at_any_step_gives_the_rows_and_records_of_an_undisturbed_run(
    job: Nightly, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result() -> object:
        values = json.loads(storage.read(f"{job.out}/nightly.json"))
        return job.rows(BEFORE), job.rows(DATE), values["nights"], record(job, BEFORE), record(job)

    # Waiting for the disk would take most of the time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("os.sync", lambda: None)
    # The run that is cut off finds a finished night with late files, and one without rows.
    job.dump(BEFORE, "a")
    assert job(BEFORE) == 0
    job.dump(BEFORE, "late", "later")
    job.dump(DATE, "d", "bad", "e")
    if fresh:
        assert job(DATE, look_back=0, max_error_rate=1.0) == 0
    shutil.copytree(job.out, job.root / "start")
    assert job(DATE, fresh=fresh, max_error_rate=1.0) == 0
    expected = result()
    # By then, --fresh has removed all, and the rest is as without it.
    last = 14 if fresh else 10**6
    steps = 0
    while steps <= last:
        shutil.rmtree(job.out)
        shutil.copytree(job.root / "start", job.out)
        with cut_off_after(steps, monkeypatch) as count, suppress(KeyboardInterrupt):
            job(DATE, fresh=fresh, max_error_rate=1.0)
            break
        assert count() == steps
        assert job(DATE, max_error_rate=1.0) == 0
        assert result() == expected, steps
        folders = [NightFolder.of(job.out, date) for date in (BEFORE, DATE)]
        outputs = [output for folder in folders for output in folder.manifests()]
        assert all(RunState(output.state_folder).is_finished() for output in outputs)
        # Those of earlier attempts are removed.
        assert {len(storage.subfolders(output.summaries)) for output in outputs} == {1}
        # Every other step, for the sake of time.
        steps += 2
    assert steps > min(last, 20)


def test_a_webhook_that_fails_loses_nothing_and_shows_no_secret(
    job: Nightly, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nightly, "post", partial(nightly.post, pause=0.001))
    monkeypatch.setenv("STPM_WEBHOOK_SECRET", "the-key")
    job.dump(DATE, "a")
    assert job(webhook="http://me:pass-word@127.0.0.1:9/T0ken?key=key-9") == 2
    assert record(job).total.images == 1
    assert "the webhook at http://127.0.0.1:9/... did not take the message: Connection refused" in caplog.text
    texts = [caplog.text, *capsys.readouterr(), *(path.read_text() for path in Path(job.out).rglob("*.json"))]
    texts.append(storage.read(f"{job.out}/nightly.html").decode())
    assert not any(secret in text for text in texts for secret in ("pass-word", "T0ken", "key-9", "the-key"))
