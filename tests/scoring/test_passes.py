"""Which pass a run folder holds, whatever was cut off there: all that comes before Ray is started."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from stpm import storage
from stpm.errors import ConfigError, ModelUnreadableError
from stpm.models import ModelStore
from stpm.placement import ClusterOptions
from stpm.scoring import manifest, run
from stpm.scoring.ledger import Counts, Effort, Identity, Ledger
from stpm.scoring.passes import Pass, run_pass, take_up
from stpm.scoring.pipeline import ScoreOptions
from stpm.scoring.run import CollectionOptions, run_score
from stpm.scoring.sources import Categories, rows_of
from stpm.scoring.target import Target


def pass_over(out: Path, *uris: str) -> Pass:
    def rows() -> Iterator[pa.Table]:
        return rows_of(["-"], Categories("nut"), (), uris)

    identity = Identity(uris, 0.01, "all", False)
    return Pass(rows, identity, ModelStore(str(out / "models")), ScoreOptions(), Target.alone(str(out / "run")))


def ended(of: Pass) -> None:
    """A pass that has ended, with rows, pictures and a page."""
    take_up(of, start_over=False, replace=False)
    for name in ("scores/scores_0.parquet", "scores/scores_1.parquet", "heatmaps/scores/nut/0.png", "triage.html"):
        storage.publish(f"{of.target.out}/{name}", b"x")
    Ledger(of.target.home).finish(Counts(2), Effort())


def uris_in(target: Target) -> list[str]:
    return [uri for shard in manifest.shards(target.manifest) for uri in storage.read_table(shard)["uri"].to_pylist()]


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
            done = Ledger(of.target.home).done()
            assert uris_in(of.target) == list(of.identity.images)
            assert len(of.target.files()) == (2 if done else 0)
    take_up(new, start_over=True, replace=False)
    assert uris_in(new.target) == ["/c.png"]
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"scores", "heatmaps"} == {"manifest", "run.json"}
    assert not new.target.files()


def scored_from_standard_input(out: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a score job that reads a list would score."""

    def stop_before_ray(of: Pass, **options: bool) -> Counts:
        take_up(of, start_over=options["start_over"], replace=options["replace"])
        storage.publish(f"{of.target.scores}/scores_0.parquet", b"x")
        raise run.DataError

    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.setattr(run, "run_pass", stop_before_ray)
    options = CollectionOptions(models=str(out / "models"), images=("-",), out=str(out / "run"), category="nut")  # type: ignore[arg-type]
    run_score(options, ScoreOptions(), ClusterOptions(), print)
    return uris_in(Target.alone(str(out / "run")))


def test_another_list_on_standard_input_is_another_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored_from_standard_input(tmp_path, "/a.png\n/b.png\n", monkeypatch) == ["/a.png", "/b.png"]
    assert scored_from_standard_input(tmp_path, "/b.png\n\n /a.png", monkeypatch) == ["/a.png", "/b.png"]
    for other in ("/c.png\n/d.png\n", "/a.png\n", ""):
        with pytest.raises(ConfigError, match=r"standard_input was '2 lines, digest .*' and is '"):
            scored_from_standard_input(tmp_path, other, monkeypatch)


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
        run_pass(of, start_over=False, replace=False, say=print)
    assert not of.target.files()
