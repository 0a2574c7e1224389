"""The models job, on a store of models that were not trained."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from stpm import storage
from stpm.console import start_logging
from stpm.errors import ConfigError, DataError
from stpm.jobs.models import run_models
from stpm.lease import hold_lease
from stpm.method.recipe import Recipe
from stpm.models.options import ModelsOptions
from stpm.models.record import Decision
from stpm.models.store import ModelStore
from tests.conftest import REPOSITORY
from tests.models.test_store import save


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    return ModelStore(str(tmp_path))


@pytest.fixture
def ids(models: ModelStore, tiny: Recipe) -> list[str]:
    """Save three models of `nut`, the last one current, and one of `bolt`; return their ids."""
    records = [save(models, dataclasses.replace(tiny, seed=seed)) for seed in (0, 1, 2)]
    return [record.model_id for record in (*records, save(models, tiny, "bolt"))]


def run(store: ModelStore, *categories: str, **options: Any) -> int:
    return run_models(ModelsOptions(store.uri, categories, **options))  # type: ignore[arg-type]


def test_models_are_listed_unleased(models: ModelStore, ids: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with hold_lease(models.uri, False):
        before = {uri: storage.read(uri) for uri in storage.files(models.uri)}
        assert run(models) == 0
        assert {uri: storage.read(uri) for uri in storage.files(models.uri)} == before
    lines = {line.split()[0]: line for line in caplog.messages if line.startswith(("nut-", "bolt-"))}
    assert lines.keys() == set(ids)
    # Images: 6 to train on and 2 held out; the validation loss and the largest calibration score.
    assert lines[ids[2]].split()[1:2] + lines[ids[2]].split()[-4:] == ["current", "8", "5", "0.6000", "0.7"]
    assert "2 before" in lines[ids[0]]
    assert "current" in lines[ids[3]]


def test_the_commands_that_messages_name_run_in_a_shell(tmp_path: Path, tiny: Recipe) -> None:
    store, name = ModelStore(str(tmp_path / "my models")), "it's a $nut"
    first, second = (save(store, dataclasses.replace(tiny, seed=seed), name).model_id for seed in (0, 1))
    # Installed or not, this Python runs the command.
    stpm = f'stpm() {{ "{sys.executable}" -c "from stpm.commands import main; main()" "$@"; }}'
    back, forward = store.roll_command(name, "--roll-back"), store.roll_command(name, "--roll-forward")
    command = f"{stpm}; {back} && cp '{tmp_path}'/*/*/current.json '{tmp_path}'/copy.json && {forward}"
    done = subprocess.run(["/bin/sh", "-c", command], check=False, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "copy.json").read_bytes())["current"]["model_id"] == first
    assert store.record(name).model_id == second


def test_a_category_without_a_previous_model_fails_alone(
    models: ModelStore, ids: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(models, "*", roll_back=True) == 2
    assert f"bolt: failed: no model was current before {ids[3]}" in caplog.text
    assert models.record("nut").model_id == ids[1]
    assert run(models, "bolt", roll_back=True) == 3
    assert run(models, "../nut", "screw") == 3
    with pytest.raises(DataError, match="nowhere: no such folder"):
        run(ModelStore(f"{models.uri}/nowhere"), "nut", keep=1)
    assert not storage.exists(f"{models.uri}/nowhere")


def test_no_damaged_model_becomes_current(models: ModelStore, ids: list[str], caplog: pytest.LogCaptureFixture) -> None:
    storage.publish(f"{models.uri}/nut/{ids[1]}/student.safetensors", b"x")
    assert run(models, "nut", roll_back=True) == 3
    assert "its SHA-256 is" in caplog.text
    assert models.record("nut").model_id == ids[2]
    storage.publish(f"{models.uri}/nut/{ids[1]}/model.json", b"{")
    assert run(models, "nut") == 0
    assert f"{ids[1]}/model.json: cannot be read by this version" in caplog.text


def test_only_an_explicit_option_removes_models(models: ModelStore, ids: list[str]) -> None:
    run(models, "nut", roll_back=True)
    assert models.model_ids("nut") == sorted(ids[:3])
    extra = storage.read(f"{models.uri}/nut/{ids[0]}/model.json")
    storage.publish(f"{models.uri}/nut/nut-left-over/model.json", extra)
    # What a kill between the record and the rest of its folder leaves; and folders of others.
    storage.publish(f"{models.uri}/nut/nut-killed/student.safetensors", b"x")
    storage.publish(f"{models.uri}/nut/mine/student.safetensors", b"x")
    storage.publish(f"{models.uri}/a:b/current.json", b"x")
    assert run(models, keep=1) == 0
    assert models.model_ids("nut") == models.model_folders("nut") == sorted(ids[:3])
    assert storage.exists(f"{models.uri}/nut/mine/student.safetensors")
    run(models, "nut", roll_forward=True)
    assert run(models, "nut", keep=1) == 0
    assert models.model_ids("nut") == sorted(ids[1:3])
    assert not [uri for uri in storage.files(models.folder("nut")) if ids[0] in uri or "left-over" in uri]
    assert [each.model_id for each in models.versions("nut").previous] == [ids[1]]
    assert models.load("bolt").record.model_id == ids[3]


def test_a_damaged_list_of_versions_is_replaced_by_the_next_model(
    models: ModelStore, ids: list[str], tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    for damaged in (b"", json.dumps({"model_id": ids[2], "data_fingerprint": "x"}).encode()):
        storage.publish(f"{models.uri}/nut/current.json", damaged)
        assert run(models, "nut") == 3
        assert "current.json: cannot be read by this version" in caplog.text
        caplog.clear()
    record = save(models, dataclasses.replace(tiny, seed=9))
    assert models.record("nut") == record
    assert models.versions("nut").previous == ()
    assert len(models.model_ids("nut")) == 4


def test_a_folder_without_models_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for uri, message in ((tmp_path, "no category has a model there"), (tmp_path / "file", "no such folder")):
        with pytest.raises(DataError, match=message):
            run(ModelStore(str(uri)))


def test_options_that_exclude_each_other_are_refused() -> None:
    for options, message in (
        ({"roll_back": True, "roll_forward": True}, "--roll-back and --roll-forward are both given; give one"),
        ({"roll_back": True}, r"without --categories; name them, or give --categories '\*' for all"),
        ({"roll_forward": True}, r"without --categories; name them, or give --categories '\*' for all"),
        ({"keep": -1}, "keep is -1; give at least 0"),
        ({"threshold": ["nut=1"], "roll_back": True}, "--threshold and --roll-back are both given; give one"),
        ({"threshold": ["nut=1"], "categories": ["nut"]}, "--threshold alone names the categories"),
        ({"threshold": ["nut=1", "nut=2"]}, "--threshold is nut=1,nut=2; give each category once"),
        *(
            ({"threshold": [text]}, f"--threshold is '{text}'; give CATEGORY=NUMBER, or CATEGORY=auto")
            for text in ("nut=nan", "nut=-inf", "nut", "nut=", "=1", "nut=high")
        ),
        ({"by": "ann"}, "--by and --because say who decides a --threshold, which is missing"),
        ({"threshold": ["nut=1"], "because": "x" * 1001}, "--because has 1,001 characters; give at most 1,000"),
        ({"cost_of_miss": 50.0, "defect_rate": 0.1}, "the least cost needs all of --cost-of-false-alarm, "),
        ({"cost_of_miss": 5.0, "cost_of_false_alarm": 1.0, "defect_rate": 0.1}, "; give all of them, or none"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModelsOptions("m", **options)  # type: ignore[arg-type]


EVIL = "<b>\x1b[2J\n5 % of \u202e scrap"


def test_a_decision_is_a_version_that_can_be_rolled_back(
    models: ModelStore, ids: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    start_logging("models", "text")
    first, weights = models.record("nut"), models.read_files(models.record("nut"))
    assert run(models, threshold=["nut=-0.25", "bolt=0"], because=EVIL) == 0
    decided = models.record("nut")
    assert decided.decision
    at = decided.decision.at
    assert decided.decision == Decision(-0.25, "ann", EVIL, at)
    assert decided == dataclasses.replace(first, decision=decided.decision, created=decided.created)
    assert decided.model_id != ids[2]
    assert models.load("nut").record == decided
    assert models.read_files(decided) == weights
    assert models.current("nut").data_fingerprint == "fingerprint"
    printed = capsys.readouterr().out
    # Three calibration images: all are above a negative score, and above 0.
    assert "nut: the threshold is -0.25, decided by ann on 20" in printed
    assert "3 of 3 calibration images are above -0.25: of 1,000 good images expect at most 1000, and" in printed
    assert f"stpm models --models {models.uri} --categories nut --roll-back" in printed
    # In the table, the texts of a person stay in their cells.
    (row,) = (line for line in printed.splitlines() if line.startswith(decided.model_id))
    assert row.split()[-8:-5] == ["-0.25", "ann", at]
    assert row.endswith(r"<b>\x1b[2J\n5 % of \u202e scrap")
    assert "\x1b" not in printed
    # A category that is named twice is rolled back once.
    assert run(models, "nut", "nut", roll_back=True) == 0
    assert models.record("nut") == first
    assert run(models, "nut", roll_forward=True, keep=1) == 0
    assert models.load("nut").record == decided
    assert [each.model_id for each in models.versions("nut").every] == [ids[2], decided.model_id]
    # Another one replaces it, and is not the same though it decides the same.
    assert run(models, threshold=["nut=-0.25"], by="bob") == 0
    assert models.record("nut").model_id not in (ids[2], decided.model_id)
    assert f"it was -0.25, decided by ann on {at} because: <b>" in capsys.readouterr().out
    for undo in (f"To undo this: {models.roll_command('nut', '--roll-back')}", "no decision is to be taken back"):
        assert run(models, threshold=["nut=auto"]) == 0
        assert models.record("nut") == first
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("nut: "))
        assert line.endswith(undo)
    assert run(models, "nut", roll_back=True) == 0
    assert str(models.record("nut").decision).startswith("-0.25, decided by bob on ")
    # Without the model before it, a decision is still complete.
    assert run(models, "nut", keep=1) == 0
    assert run(models, threshold=["nut=0.5"], keep=1) == 0
    assert ids[2] not in models.model_ids("nut")
    models.load("nut")


def test_a_decision_on_a_category_without_a_model_fails_and_the_others_are_made(
    models: ModelStore, ids: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(models, threshold=["nut=0.8", "screw=1", "../nut=1"], by="ann") == 2
    assert "screw: failed: " in caplog.text
    assert str(models.record("nut").decision).startswith("0.8, decided by ann on ")
    storage.publish(f"{models.uri}/bolt/{ids[3]}/student.safetensors", b"x")
    assert run(models, threshold=["bolt=0.8"], by="ann") == 3
    assert models.record("bolt").decision is None
    monkeypatch.setattr("getpass.getuser", Mock(side_effect=OSError))
    with pytest.raises(ConfigError, match="--by is missing, and this process has no login name"):
        run(models, threshold=["nut=0.9"])
    for by, because in (("ann\udcff", ""), ("ann", "\ud800")):
        with pytest.raises(ConfigError, match="whose name and reason are UTF-8"):
            run(models, threshold=["nut=0.9"], by=by, because=because)
    with pytest.raises(ConfigError, match=r"the threshold is 1e\+39; give a finite number"):
        run(models, threshold=["nut=1e39"], by="ann")


@pytest.mark.usefixtures("ids")
def test_the_decisions_of_several_people_at_once_are_all_kept(models: ModelStore) -> None:
    with ThreadPoolExecutor() as threads:
        decided = [threads.submit(run, models, threshold=[f"nut={i}"], by="ann", wait=True) for i in range(4)]
    assert [each.result() for each in decided] == [0] * 4
    made = [models.record("nut", version.model_id).decision for version in models.versions("nut").every[3:]]
    assert {each and each.threshold for each in made} == {0.0, 1.0, 2.0, 3.0}
