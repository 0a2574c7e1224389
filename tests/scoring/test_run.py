"""Which run a folder holds, whatever was cut off there: all steps before Ray is started, and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import NodeDiedError, RayError

from stpm import storage
from stpm.errors import (
    ConfigError,
    DataError,
    ModelError,
    ModelUnreadableError,
    OtherRunError,
    RunDamagedError,
    RunInterruptedError,
    StpmError,
)
from stpm.jobs.models import run_models
from stpm.jobs.score import run_score
from stpm.method.recipe import Recipe
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, Names
from stpm.scoring import resume as resume_module
from stpm.scoring import run as run_module
from stpm.scoring import run_state
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import Shard
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import CollectionOptions, OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.progress import Snapshot
from stpm.scoring.resume import resume_or_start
from stpm.scoring.run import run_scoring
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.run_statistics import RunResult, RunStatistics, UnfinishedImage
from stpm.scoring.scoring_run import ScoringRun
from tests.conftest import fail_to_read
from tests.datasets import make_category, make_output, write_task
from tests.models.test_store import save
from tests.scoring.inputs.helpers import list_rows
from tests.scoring.inputs.test_manifest import read_shards

# How the errors of a run that must start over end.
OR_FRESH = ", or --fresh, which removes the rows and starts over"


def make_run(root: Path, *uris: str) -> ScoringRun:
    store, output = ModelStore(str(root / "models")), RunOutput.single(str(root / "run"))
    return ScoringRun(lambda: [list_rows(uris)], ScoringConfig(uris, 0.01), store, ScoreOptions(), output)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start without reading a model."""
    monkeypatch.setattr(resume_module, "read_models", lambda *_: {})


def finish(run: ScoringRun) -> None:
    """Leave a finished run, with rows, heatmaps and a page."""
    state, _, _ = resume_or_start(run, start_over=False, replace=False)
    for name in ("scores/scores_0.parquet", "scores/scores_1.parquet", "heatmaps/scores/nut/0.png", "triage.html"):
        storage.publish(f"{run.output.folder}/{name}", b"x")
    state.finish(RunResult(2))


def uris_in(output: RunOutput) -> list[str]:
    return [uri for shard in read_shards(output.manifest) for uri in shard["uri"].to_pylist()]


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("steps", range(12))
def test_clearing_that_is_cut_off_leaves_no_run_to_resume(
    tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_run(tmp_path, "/a.png", "/b.png"), make_run(tmp_path, "/c.png")
    finish(old)
    remaining_steps = [steps]
    remove = storage.remove

    def cut_off(uri: str) -> None:
        remaining_steps[0] -= 1
        if remaining_steps[0] < 0:
            raise KeyboardInterrupt
        # The last step removes only the first file of a folder.
        for name in storage.files(uri)[: None if remaining_steps[0] else 1]:
            remove(name)
        if remaining_steps[0]:
            remove(uri)

    monkeypatch.setattr(storage, "remove", cut_off)
    with suppress(KeyboardInterrupt):
        resume_or_start(new, start_over=True, replace=False)
    monkeypatch.setattr(storage, "remove", remove)
    for run in (old, new):
        # Without --fresh: refused, or intact, or none of the old files is resumed.
        try:
            state, _, _ = resume_or_start(run, start_over=False, replace=False)
        except ConfigError as error:
            assert "holds the rows of another run: images was" in str(error)
            assert RunState(run.output.state_folder).record.config
        else:
            assert uris_in(run.output) == list(run.config.images)
            assert len(run.output.files()) == (2 if state.is_finished() else 0)
    resume_or_start(new, start_over=True, replace=False)
    assert uris_in(new.output) == ["/c.png"]
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"scores", "heatmaps"} == {"manifest", "run.json"}
    assert not new.output.files()


def test_starting_over_with_nothing_to_score_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "/a.png", "/b.png")
    with monkeypatch.context() as patch:
        patch.setattr(resume_module, "read_models", lambda *_: {})
        finish(run)
    before = run.output.written_uris()
    unmounted = [str(tmp_path / "unmounted")]
    partly = dataclasses.replace(
        run, rows=lambda: chain([list_rows(["/a.png"])], image_rows(unmounted, CategoryRule("nut")))
    )
    # The store has no model.
    for mistaken, message in ((partly, "unmounted: no images here"), (run, "no model for category 'nut'")):
        with pytest.raises(StpmError, match=message):
            resume_or_start(mistaken, start_over=True, replace=False)
        assert run.output.written_uris() == before
        assert RunState(run.output.state_folder).is_finished()


def publish_rows(output: RunOutput, start: int, stop: int) -> None:
    """Write rows with a score as a task does, in one file."""
    count = stop - start
    same = {"category": ["nut"], "threshold": [1.0], "is_anomalous": [True], "p_value": [0.1], "bytes": [1]}
    values = {name: each * count for name, each in same.items()} | {"score": range(count)}
    shards = pa.concat_tables(read_shards(output.manifest)).slice(start, count)
    rows = make_output(count, **values, **{name: shards[name].to_pylist() for name in ("image_id", "uri")})
    write_task(output, rows, start)


def replace_ray(monkeypatch: pytest.MonkeyPatch, score_shards: Callable[..., None], *unfinished: str) -> None:
    """Let another function score, which leaves these images unfinished."""
    images = [UnfinishedImage(uri, "unreadable", "expired") for uri in unfinished]
    progress = SimpleNamespace(read=lambda: Snapshot(RunStatistics(images=2), images, "", []))
    monkeypatch.setattr(run_module, "connected", nullcontext)
    monkeypatch.setattr(run_module, "show_scoring_progress", lambda *_, stop_on_failures: nullcontext(progress))
    monkeypatch.setattr(run_module, "score_shards", score_shards)


@pytest.fixture
def score(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, int]]:
    """A score job of two images without Ray, by its options; returns when each file of the run folder was written."""
    save(ModelStore(str(tmp_path / "models")), tiny)
    make_category(str(tmp_path), "nut", good=2)

    def score_shards(run: ScoringRun, *_: Any) -> None:
        publish_rows(run.output, 0, 2)

    replace_ray(monkeypatch, score_shards)

    def run(**options: Any) -> dict[str, int]:
        images = (str(tmp_path / "nut/test/good"),)
        collection = CollectionOptions(str(tmp_path / "models"), images, str(tmp_path / "run"), "nut", **options)  # type: ignore[arg-type]
        assert run_score(collection, OutputOptions(), ScoreOptions(), ClusterOptions()) == 0
        files = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.parent.name != ".lease")
        return {path.name: path.stat().st_mtime_ns for path in files}

    return run


def test_a_second_run_of_a_finished_run_writes_nothing_and_reads_no_row(
    score: Callable[..., dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(top=2)
    shards = {"000000-000000.parquet", "manifest.json"}
    rows = f"scores_000000_{32 * 'a'}_000000_{8 * 'c'}.parquet"
    assert first.keys() == shards | {"run.json", "000000.json", rows, "triage.html", "_SUCCESS"}
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.dataset.dataset", lambda *_, **__: pytest.fail("rows were read"))
        assert score(top=2) == first
    shorter = score(top=1)
    assert {name for name in first if shorter[name] != first[name]} == {"triage.html", "run.json"}


def test_a_finished_run_whose_summaries_are_missing_starts_over(score: Callable[..., object], tmp_path: Path) -> None:
    score()
    storage.remove(f"{tmp_path}/run/summaries/000000/000000.json")
    with pytest.raises(DataError, match=rf"/summaries are of 0 rows, .*; restore the files, or give .*{OR_FRESH}$"):
        score()


def test_a_run_with_other_models_is_refused_or_started_over(
    score: Callable[..., dict[str, int]], tmp_path: Path, tiny: Recipe
) -> None:
    before = score()
    bound = RunState(str(tmp_path / "run")).store_and_model_ids()
    save(ModelStore(str(tmp_path / "models")), dataclasses.replace(tiny, seed=7))
    with pytest.raises(OtherRunError, match=r"of another run: nut was 'nut-.*' and is 'nut-.*'; give another --out"):
        score()
    assert RunState(str(tmp_path / "run")).store_and_model_ids() == bound
    after = score(fresh=True)
    assert all(after.get(name) != written for name, written in before.items())
    assert RunState(str(tmp_path / "run")).store_and_model_ids() != bound


def test_an_unfinished_run_goes_on_with_its_models(tmp_path: Path, tiny: Recipe) -> None:
    run = make_run(tmp_path, "/a.png")
    first = save(run.store, tiny)
    resume_or_start(run, start_over=False, replace=False)
    storage.publish(f"{run.output.scores}/scores_0.parquet", b"x")
    second = save(run.store, dataclasses.replace(tiny, seed=7))
    state, _, models = resume_or_start(run, start_over=False, replace=False)
    assert models["nut"].model_id == first.model_id != second.model_id
    assert state.record.models == {"nut": first.model_id}
    storage.remove(f"{run.store.uri}/nut/{first.model_id}")
    with pytest.raises(RunDamagedError, match=rf"no model {first.model_id} .*; this run began with that model$"):
        resume_or_start(run, start_over=False, replace=False)
    _, _, models = resume_or_start(run, start_over=False, replace=True)
    assert models["nut"].model_id == second.model_id
    assert not run.output.files()


def test_a_run_that_has_begun_keeps_the_threshold_that_it_began_with(
    tmp_path: Path, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, "/a.png")
    save(run.store, tiny)

    def decided_threshold() -> float | None:
        caplog.clear()
        _, _, models = resume_or_start(run, start_over=False, replace=False)
        storage.publish(f"{run.output.scores}/scores_0.parquet", b"x")
        decision = models["nut"].decision
        named = [each for each in caplog.messages if each.startswith("thresholds that --false-alarm-rate does not")]
        assert named == ([f"thresholds that --false-alarm-rate does not change: nut {decision}"] if decision else [])
        return decision and decision.threshold

    for number, now in enumerate((None, 0.5)):
        if now:
            run = dataclasses.replace(run, output=RunOutput.single(str(tmp_path / f"run {number}")))
        assert decided_threshold() == now
        run_models(ModelsOptions(run.store.uri, threshold=Names([f"nut={number}.5"]), by="ann"))
        assert decided_threshold() == now
    RunState(run.output.state_folder).finish(RunResult(1))
    with pytest.raises(OtherRunError, match=r"of another run: nut was 'nut-.*' and is 'nut-"):
        decided_threshold()


def test_nodes_are_compared_with_the_versions_that_a_run_began_with(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "/a.png")
    save(run.store, tiny)
    monkeypatch.setattr(run_state, "installed_versions", lambda: {"torch": "1.0"})
    resume_or_start(run, start_over=False, replace=False)
    monkeypatch.setattr(run_state, "installed_versions", lambda: {"torch": "2.0"})
    replace_ray(monkeypatch, lambda run, *_: publish_rows(run.output, 0, 1))
    show = Mock(wraps=run_module.show_scoring_progress)
    monkeypatch.setattr(run_module, "show_scoring_progress", show)
    run_scoring(make_run(tmp_path, "/a.png"))
    (_, versions), _ = show.call_args
    assert versions["torch"] == "1.0"


def test_unfinished_files_of_killed_processes_are_removed(
    score: Callable[..., dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heatmaps = tmp_path / "run" / "heatmaps" / "scores" / "nut"

    def score_shards(run: ScoringRun, *_: Any) -> None:
        heatmaps.mkdir(parents=True)
        for name in (f".{32 * 'a'}.part", "b.png"):
            (heatmaps / name).touch()
        publish_rows(run.output, 0, 2)
        (tmp_path / "run" / "scores" / f".{32 * 'a'}.part").touch()

    replace_ray(monkeypatch, score_shards)
    score()
    assert [path.name for path in heatmaps.iterdir()] == ["b.png"]
    assert len([*(tmp_path / "run" / "scores").iterdir()]) == 1


def test_a_run_without_all_rows_is_unfinished_and_the_next_one_keeps_them(
    score: Callable[..., dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    replace_ray(monkeypatch, lambda run, *_: publish_rows(run.output, 0, 1), "/b.png")
    with pytest.raises(AssertionError, match="2 == 0"):
        score()
    assert "/b.png: unreadable: expired" in caplog.text
    (summary,) = [each for each in caplog.records if "1 images are unfinished" in each.getMessage()]
    assert summary.levelname == "ERROR"
    assert not (tmp_path / "run" / "_SUCCESS").exists()

    def score_rest(run: ScoringRun, *_: Any) -> None:
        publish_rows(run.output, 1, 2)
        left = f"scores_000001_{32 * 'b'}_000000_{8 * 'd'}.parquet"
        storage.publish(f"{run.output.scores}/{left}", b"of a killed process")

    replace_ray(monkeypatch, score_rest)
    score()
    assert len(RunOutput.single(f"{tmp_path}/run").files()) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            (each, rf"000000\.parquet, which lists images of this run, is damaged .*{OR_FRESH}$")
            for each in (b"PAR1", None)
        ),
        (OSError("503 Slow Down"), "a task failed; finished work is kept; run the same command again to continue"),
    ],
)
def test_after_a_pipeline_failed_at_a_damaged_list_of_images_the_run_must_start_over(
    score: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, damage: bytes | OSError | None, message: str
) -> None:
    """The same command, which goes on after a cut-off, would fail again."""

    def score_shards(run: ScoringRun, shards: list[Shard], *_: Any) -> None:
        ((uri, *_),) = shards
        if isinstance(damage, OSError):
            fail_to_read(monkeypatch, damage, [uri])
        elif damage:
            storage.publish(uri, damage)
        else:
            storage.remove(uri)
        raise RayError("a task failed")

    replace_ray(monkeypatch, score_shards)
    with pytest.raises((RunDamagedError, RunInterruptedError), match=message):
        score()


def internal_error() -> Exception:
    """Make an error of Ray Data's own code, as `ray.data.exceptions.omit_traceback_stdout` raises it."""
    error = AssertionError("a queue is not empty")
    error.__cause__ = SystemException()
    return error


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (NodeDiedError("its node died"), "its node died"),
        (RayError(), "RayError"),
        (ExecutionTimeoutError("no progress"), "no progress"),
        (internal_error(), "a queue is not empty"),
        (AssertionError("a bug of ours"), ""),
    ],
)
def test_a_failure_of_ray_cuts_the_run_off(
    score: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    monkeypatch.setattr(run_module, "score_shards", Mock(side_effect=failure))
    cut_off = rf"^scoring was interrupted: {reason}; finished work is kept; run the same "
    kind, message = (RunInterruptedError, cut_off) if reason else (AssertionError, "a bug of ours")
    with pytest.raises(kind, match=message):
        score()


@pytest.mark.parametrize("error", [PermissionError("403 Forbidden"), None])
def test_an_unreadable_or_damaged_model_ends_the_run_before_any_row(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch, error: PermissionError | None
) -> None:
    """If it were treated as missing, its rows would be errors, and never be scored again."""
    run = make_run(tmp_path, "/a.png")
    record = save(run.store, tiny)
    (tmp_path / "models" / "nut" / record.model_id / "model.json").write_bytes(b"{")
    if error:
        fail_to_read(monkeypatch, error, ["nut/current.json"])
    message = r"nut/current.json: cannot be read: 403 Forbidden" if error else r"model.json: cannot be read"
    with pytest.raises(ModelUnreadableError if error else ModelError, match=message):
        run_scoring(run)
    assert not run.output.files()


@pytest.mark.usefixtures("no_models")
def test_files_that_no_run_wrote_are_never_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "/a.png")
    for name in ("summaries/epoch5.json", "manifest/list.csv", "triage.html", "scores/scores_0.parquet"):
        storage.publish(f"{run.output.folder}/{name}", b"precious")
        for start_over in (False, True):
            with pytest.raises(ConfigError, match=r"exists, but no .*run\.json shows that a run wrote it; name anot"):
                resume_or_start(run, start_over=start_over, replace=True)
        assert storage.read(f"{run.output.folder}/{name}") == b"precious"
        storage.remove(f"{run.output.folder}/{name.partition('/')[0]}")
    resume_or_start(run, start_over=False, replace=False)
