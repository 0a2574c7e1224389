"""Which pass a run folder holds, whatever was cut off there: all that comes before Ray is started."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stpm import storage
from stpm.cluster.placement import ClusterOptions
from stpm.errors import ConfigError, ModelError, ModelUnreadableError
from stpm.jobs import score as run
from stpm.jobs.score import CollectionOptions, run_score
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.scoring import run as passes
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.output import RunOutput
from stpm.scoring.pipeline import ScoreOptions
from stpm.scoring.progress import Left
from stpm.scoring.resuming.run_state import Counts, Effort, RunConfig, RunState
from stpm.scoring.run import ScoringRun, run_scoring, take_up
from stpm.scoring.schema import OUTPUT, table
from tests.datasets import make_category
from tests.models.test_store import save


def pass_over(out: Path, *uris: str) -> ScoringRun:
    def rows() -> Iterator[pa.Table]:
        return image_rows(["-"], CategoryRule("nut"), (), uris)

    config = RunConfig(uris, 0.01, "all", False)
    return ScoringRun(rows, config, ModelStore(str(out / "models")), ScoreOptions(), RunOutput.alone(str(out / "run")))


def ended(of: ScoringRun) -> None:
    """A pass that has ended, with rows, pictures and a page."""
    take_up(of, start_over=False, replace=False)
    for name in ("scores/scores_0.parquet", "scores/scores_1.parquet", "heatmaps/scores/nut/0.png", "triage.html"):
        storage.publish(f"{of.output.out}/{name}", b"x")
    RunState(of.output.home).finish(Counts(2), Effort())


def uris_in(output: RunOutput) -> list[str]:
    return [uri for shard in manifest.shards(output.manifest) for uri in storage.read_table(shard)["uri"].to_pylist()]


@pytest.mark.parametrize("steps", range(12))
def test_clearing_that_is_cut_off_leaves_no_pass_to_go_on_with(
    tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = pass_over(tmp_path, "/a.png", "/b.png"), pass_over(tmp_path, "/c.png")
    ended(old)
    left = [steps]
    remove = storage.remove

    def cut_off(uri: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        # Of a folder what comes first in the listing goes first.
        for name, _ in storage.files(uri)[: None if left[0] else 1]:
            remove(name)
        if left[0]:
            remove(uri)

    monkeypatch.setattr(storage, "remove", cut_off)
    with suppress(KeyboardInterrupt):
        take_up(new, start_over=True, replace=False)
    monkeypatch.setattr(storage, "remove", remove)
    for of in (old, new):
        # Without --fresh: refused, or as it was, or nothing of what was there is taken up.
        try:
            take_up(of, start_over=False, replace=False)
        except ConfigError as error:
            assert "holds the rows of another pass" in str(error)
        else:
            done = RunState(of.output.home).done()
            assert uris_in(of.output) == list(of.config.images)
            assert len(of.output.files()) == (2 if done else 0)
    take_up(new, start_over=True, replace=False)
    assert uris_in(new.output) == ["/c.png"]
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"scores", "heatmaps"} == {"manifest", "run.json"}
    assert not new.output.files()


def scored_from_standard_input(out: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a score job that reads a list would score."""

    def stop_before_ray(of: ScoringRun, **options: bool) -> Counts:
        take_up(of, start_over=options["start_over"], replace=options["replace"])
        storage.publish(f"{of.output.scores}/scores_0.parquet", b"x")
        raise run.DataError

    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.setattr(run, "run_scoring", stop_before_ray)
    options = CollectionOptions(models=str(out / "models"), images=("-",), out=str(out / "run"), category="nut")  # type: ignore[arg-type]
    run_score(options, ScoreOptions(), ClusterOptions())
    return uris_in(RunOutput.alone(str(out / "run")))


def test_another_list_on_standard_input_is_another_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored_from_standard_input(tmp_path, "/a.png\n/b.png\n", monkeypatch) == ["/a.png", "/b.png"]
    assert scored_from_standard_input(tmp_path, "/b.png\n\n /a.png", monkeypatch) == ["/a.png", "/b.png"]
    for other in ("/c.png\n/d.png\n", "/a.png\n", ""):
        with pytest.raises(ConfigError, match=r"standard_input was '2 lines, digest .*' and is '"):
            scored_from_standard_input(tmp_path, other, monkeypatch)


def score_without_ray(
    shards: object, records: object, store: object, options: object, output: RunOutput, _: object
) -> tuple[Effort, list[Left]]:
    """Two rows with scores, in one file."""
    columns: dict[str, list[Any]] = {field.name: [None if field.nullable else ""] * 2 for field in OUTPUT}
    columns |= {"uri": uris_in(output), "category": ["nut"] * 2, "score": [2.0, 3.0], "threshold": [1.0] * 2}
    columns |= {"image_id": [0, 1], "is_anomalous": [True] * 2, "p_value": [0.1] * 2, "bytes": [1] * 2}
    storage.publish(f"{output.scores}/scores_0.parquet", storage.parquet(table(columns, OUTPUT)))
    return Effort(), []


def test_a_rerun_of_a_pass_that_has_ended_writes_nothing_and_reads_no_row(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ModelStore(str(tmp_path / "models")), tiny)
    make_category(str(tmp_path), "nut", good=2)
    monkeypatch.setattr(passes, "connected", nullcontext)
    monkeypatch.setattr(passes, "remaining_shards", lambda output: [("all of them", 2)])
    monkeypatch.setattr(passes, "score_shards", score_without_ray)
    images = (str(tmp_path / "nut/test/good"),)

    def score(top: int) -> dict[str, int]:
        """When each file of the run folder was written after a run with a page of so many."""
        options = CollectionOptions(str(tmp_path / "models"), images, str(tmp_path / "run"), "nut", top=top)  # type: ignore[arg-type]
        assert run_score(options, ScoreOptions(), ClusterOptions()) == 0
        files = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.parent.name != ".lease")
        return {path.name: path.stat().st_mtime_ns for path in files}

    first = score(top=2)
    assert first.keys() == {
        "000000.parquet",
        "manifest.json",
        "run.json",
        "scores_0.parquet",
        "triage.html",
        "_SUCCESS",
    }
    with monkeypatch.context() as patch:
        patch.setattr(RunOutput, "dataset", lambda self: pytest.fail("rows were read"))
        assert score(top=2) == first
    shorter = score(top=1)
    assert {name for name in first if shorter[name] != first[name]} == {"triage.html", "run.json"}


def test_a_model_that_storage_does_not_give_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a category without a model are final errors."""
    of = pass_over(tmp_path, "/a.png")
    original = storage.read

    def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
        if uri.endswith("nut/current.json"):
            raise PermissionError("403 Forbidden")
        return original(uri, start, end)

    monkeypatch.setattr(storage, "read", read)
    with pytest.raises(ModelUnreadableError, match=r"nut/current.json: cannot be read: 403 Forbidden"):
        run_scoring(of, start_over=False, replace=False)
    assert not of.output.files()


def test_a_folder_that_no_run_made_is_left_as_it_is(tmp_path: Path) -> None:
    of = pass_over(tmp_path, "/a.png")
    for name in ("checkpoint/epoch5.pt", "manifest/list.csv", "triage.html"):
        storage.publish(f"{of.output.out}/{name}", b"precious")
        for start_over in (False, True):
            with pytest.raises(ConfigError, match=r"is there, and no .*run.json says that a run made it"):
                take_up(of, start_over=start_over, replace=True)
        assert storage.read(f"{of.output.out}/{name}") == b"precious"
        storage.remove(f"{of.output.out}/{name.partition('/')[0]}")
    take_up(of, start_over=False, replace=False)


def test_a_damaged_model_is_not_taken_for_none(tmp_path: Path, tiny: Recipe) -> None:
    record = save(ModelStore(str(tmp_path / "models")), tiny)
    (tmp_path / "models" / "nut" / record.model_id / "model.json").write_bytes(b"{")
    with pytest.raises(ModelError, match=r"model.json: cannot be read"):
        run_scoring(pass_over(tmp_path, "/a.png"), start_over=False, replace=False)


def test_a_list_with_odd_names_is_taken_in() -> None:
    lines = ["a.png", "b\udcff.png", "~$draft.png", "~nosuchuser/x.png", "file://~x/a.png"]
    with run.taken_in(lines) as (digest, file):
        file.seek(0)
        assert file.read().splitlines() == lines
    assert digest.startswith("5 lines, ")
