"""A short version of bench/healthy_year.py."""

import pytest

from bench.healthy_year import Trial, find, healthy_year, trials


def test_verdicts_on_healthy_categories_do_not_cry_wolf() -> None:
    year = healthy_year(seed=0, categories=40, nights=60)
    assert (year.months, year.reasons) == (2, {})


@pytest.mark.parametrize("trial", [each for each in trials() if each.is_promised], ids=lambda trial: str(trial.text))
def test_promised_faults_are_named_if_any_test_can_name_them(trial: Trial) -> None:
    found, best = find(trial, 20)[-1], trial.oracle()
    assert found >= 0.9 or (best is not None and best < 0.1)
