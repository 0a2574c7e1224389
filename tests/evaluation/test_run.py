"""The evaluate job's refusals, before Ray is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stpm.errors import ConfigError
from stpm.evaluation.options import EvaluateOptions, EvaluationOptions, GateOptions
from stpm.evaluation.run import run_evaluate
from tests.evaluation.runs import scored_run


def evaluated(**options: str) -> tuple[int, str]:
    said: list[str] = []
    code = run_evaluate(EvaluateOptions(**options), EvaluationOptions(), GateOptions(), said.append)
    return code, "\n".join(said)


def test_a_run_folder_that_is_none_is_said(tmp_path: Path) -> None:
    code, said = evaluated(scores=str(tmp_path / "nowhere"))
    assert code == 3
    assert "nowhere: no scores here" in said
    with pytest.raises(ConfigError, match="--scores is missing"):
        EvaluateOptions()


def test_a_pass_that_has_not_come_so_far_is_said(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    Path(target.home).mkdir(parents=True)
    code, said = evaluated(scores=target.out)
    assert code == 3
    assert "no record of a scored pass" in said


def test_the_models_that_made_the_scores_are_asked_for_and_no_others(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    Path(target.home).mkdir(parents=True)
    run = {"identity": {}, "models": {"nut": "nut-before"}, "store": str(tmp_path / "models")}
    (Path(target.home) / "run.json").write_text(json.dumps(run))
    code, said = evaluated(scores=target.out)
    assert code == 3
    assert "models: no model nut-before for category 'nut'" in said


def test_a_baseline_is_read_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"baseline nothing\.json: cannot be read"):
        run_evaluate(
            EvaluateOptions(scores="nowhere"), EvaluationOptions(), GateOptions(baseline="nothing.json"), print
        )
