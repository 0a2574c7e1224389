"""One set of options from the command line, the environment, a YAML file and the preset."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

from stpm.cli import Job, run_job
from stpm.errors import ConfigError
from stpm.jobs.benchmark_options import BenchmarkOptions
from stpm.method.recipe import PRESETS, Recipe
from tests.conftest import REPOSITORY


def job(name: str) -> Job:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "jobs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Job = module.JOB
    return found


def recipe_of(*argv: str) -> Recipe:
    return job("benchmark").parse(["--data", "x", *argv])[1]  # type: ignore[no-any-return]


def test_the_command_line_of_the_issue() -> None:
    line = (
        "--data s3://b/d --out s3://b/o --categories a,b --preset notebook --epochs 3 --seeds 0,1 "
        "--teacher resnet18.tv_in1k --teacher-weights /w.pth --workers 2"
    )
    options, recipe, pool, *_ = job("benchmark").parse(line.split())
    assert options == BenchmarkOptions("s3://b/d", "s3://b/o", options.categories, options.seeds)
    assert (options.categories, options.seeds) == (("a", "b"), (0, 1))
    assert (recipe.epochs, recipe.optimiser, recipe.batch_size) == (3, "adam", 4)
    assert (recipe.teacher, recipe.teacher_weights, pool.workers) == ("resnet18.tv_in1k", "/w.pth", 2)


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: notebook\nepochs: 7\nbatch_size: 9\nlevels: [1, 2]\nteacher_weights: from-file\n")
    assert recipe_of("--config", str(file)).learning_rate == 4e-4
    monkeypatch.setenv("STPM_EPOCHS", "8")
    monkeypatch.setenv("STPM_SIZE", "128")
    recipe = recipe_of("--config", str(file), "--batch-size", "11")
    assert (recipe.batch_size, recipe.epochs, recipe.size) == (11, 7, "128x128")
    assert (recipe.levels, recipe.teacher_weights) == ((1, 2), "from-file")


def test_without_data_the_demo_set_brings_its_defaults() -> None:
    demo = job("benchmark").parse([])[1]
    assert (demo.teacher, demo.size, demo.epochs) == ("demo", "128x128", 5)
    assert job("benchmark").parse(["--epochs", "2"])[1].epochs == 2
    assert recipe_of().teacher == "resnet18.tv_in1k"


def test_the_resolved_configuration_is_printed_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", "x", "--preset", "notebook", "--epochs", "5", "--categories", "a,b"]
    with pytest.raises(SystemExit):
        job("benchmark").parse([*argv, "--print-config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["epochs"] == 5
    (tmp_path / "c.yaml").write_text(printed)
    assert job("benchmark").parse(["--config", str(tmp_path / "c.yaml")]) == job("benchmark").parse(argv)


@pytest.mark.parametrize(
    "words",
    [
        *(["--preset", preset] for preset in PRESETS),
        [
            "--student",
            "none",
            "--memory",
            "100",
            "--memory-levels",
            "1,3",
            "--smoothing",
            "4",
            "--top-fraction",
            "0.01",
        ],
        ["--memory", "0", "--fusion", "sum"],
    ],
)
def test_every_choice_of_a_recipe_is_printed_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        job("benchmark").parse(["--data", "x", *words, "--print-config"])
    printed = capsys.readouterr().out
    assert {field.name for field in dataclasses.fields(Recipe)} - {"seed"} <= yaml.safe_load(printed).keys()
    (tmp_path / "c.yaml").write_text(printed)
    assert recipe_of("--config", str(tmp_path / "c.yaml")) == recipe_of(*words)


def test_the_parts_of_a_model_are_those_asked_for() -> None:
    recipe = recipe_of("--student", "none", "--memory", "100", "--memory-levels", "1,3", "--top-fraction", "0.01")
    assert (recipe.student, recipe.memory, recipe.memory_levels) == ("none", 100, (1, 3))
    assert (recipe.fusion, recipe.smoothing, recipe.top_fraction) == ("quantile", 0.0, 0.01)
    assert recipe_of("--memory", "0", "--fusion", "sum").fusion == "sum"


@pytest.mark.parametrize("size", ["640x256", "auto"])
def test_a_size_is_printed_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    argv = ["--data", "x", "--preset", "paper", "--size", size]
    with pytest.raises(SystemExit):
        job("benchmark").parse([*argv, "--print-config"])
    printed = capsys.readouterr().out
    assert f"size: {size}\n" in printed
    (tmp_path / "c.yaml").write_text(printed)
    assert job("benchmark").parse(["--config", str(tmp_path / "c.yaml")]) == job("benchmark").parse(argv)
    assert recipe_of("--size", size).size == size
    (tmp_path / "d.yaml").write_text("size: 96\n")
    assert recipe_of("--config", str(tmp_path / "d.yaml")).size == "96x96"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "many"], "epochs"),
        (["--size", "big"], "'big' is not a size; give HEIGHTxWIDTH"),
        (["--size", "640x8"], "size is '640x8'; give 32 to 4096 pixels each, or auto"),
        (["--epochs", "0"], "epochs is 0; give at least 1"),
        (["--student", "none", "--memory", "0"], "student is 'none'; give --memory too"),
        (["--preset", "paper", "--memory", "9"], "fusion is 'product'; give quantile"),
        (["--memory-levels", "3,2"], "memory-levels is"),
        (["--fusion", "calibrated"], "fusion"),
        (["--student", "big"], "student"),
        (["--no-such-option", "1"], "there is no option --no-such-option; see --help"),
        (["--epoch=1"], "there is no option --epoch; did you mean --epochs?"),
        (["--epochs", "1.5"], "epochs is 1.5; give INTEGER; see --help"),
        (["--student", "nne"], "student is nne; give {stpm,none}"),
        (["--preset", "secret"], "preset"),
        (["--seeds", "0,0"], "seeds is '0,0'; give each seed once"),
        (["--seeds", "a"], "seeds"),
        (["--false-alarm-rate", "2"], "false-alarm-rate is 2.0; give a fraction between 0 and 1"),
        (["--config", "/no/such/file.yaml"], "config"),
    ],
)
def test_what_cannot_be_parsed_is_one_clear_error(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job("benchmark").parse(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search("<class|Literal|Parser key", str(caught.value))


def test_an_unknown_option_in_the_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("weight_decey: 0\n")
    with pytest.raises(ConfigError, match="there is no option --weight-decey; did you mean --weight-decay"):
        recipe_of("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("name", ["fit", "score", "benchmark", "evaluate"])
def test_help_explains_every_option_in_its_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job(name).parse(["--help"])
    shown = capsys.readouterr().out
    required = 0
    for title, kind in job(name).groups.items():
        # Without spaces: lines are broken at hyphens too.
        group = "".join(shown.split(f"\n{title}:\n")[1].split("\n\n")[0].split())
        for field in dataclasses.fields(kind):
            if field.name not in job(name).hidden:
                assert f"--{field.name.replace('_', '-')}" in group
                assert "".join(field.metadata["help"].split()) in group
                assert not field.metadata["required"] or f"--{field.name} ..." in shown.splitlines()[0]
                required += field.metadata["required"]
    assert " ".join(shown.split()).count("(required)") == required
    assert not re.search("<class|Literal|Names|Integers|None|False|True", shown)
    assert shown.count("example:\n  python jobs/") == 1


@pytest.mark.parametrize("name", ["fit", "score", "benchmark", "evaluate"])
def test_the_example_in_the_help_is_right_and_what_it_runs_is_there(name: str) -> None:
    program, *argv = job(name).example.removeprefix("python jobs/").split()
    assert program == job(name).prog
    job(name).parse(argv)
    assert callable(resolve_name(job(name).run))


SCORE = ["score", "--models", "m", "--category", "nut", "--images"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *(([name], " missing; see --help") for name in ("fit", "score", "evaluate")),
        ([*SCORE, "i", "--out", "file/run"], "file is a file"),
        (["fit", "--data", "d", "--models", "file"], "file is a file"),
        (["benchmark", "--data", "d", "--out", "file/run"], "file is a file"),
        (["evaluate", "--scores", "d", "--out", "file/run"], "file is a file"),
        (
            ["score", "--models", "m", "--images", "i", "--out", "o", "--category-from", "{category}/{2}"],
            "{2} is no name",
        ),
        ([*SCORE, os.fsdecode(b"\xff"), "--out", "o"], "%FF: a name that is not UTF-8"),
        ([*SCORE, "nonsense://i", "--out", "nonsense://o"], "use a local path, s3://"),
    ],
)
def test_what_cannot_be_run_exits_with_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_:
        run_job(job(words[0]))
    assert exit_.value.code == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def fill_the_disk() -> int:
    raise OSError(28, "No space left on device", "/data/x")


def test_what_a_disk_says_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["full.py"])
    with pytest.raises(SystemExit) as exit_:
        run_job(Job("full.py", None, {}, f"{__name__}:fill_the_disk", ""))
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: '/data/x'\n"


def test_the_preset_default_is_the_default() -> None:
    assert recipe_of() == PRESETS["default"]
    assert recipe_of("--preset", "paper") == PRESETS["paper"]


def test_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job("fit").parse(["--preset", "notebook", "--help"])
    assert "default: 0.0004)" in " ".join(capsys.readouterr().out.split())


def test_what_takes_several_values_may_be_given_several_times() -> None:
    line = "--data x --require mean.image_auroc=0.9 --seeds=3 --require=nut.image_auroc=0.8,a.image_recall=0 --seeds 4"
    options, *_, gate, _, _ = job("benchmark").parse(line.split())
    assert list(options.seeds) == [3, 4]
    assert list(gate.require) == ["mean.image_auroc=0.9", "nut.image_auroc=0.8", "a.image_recall=0"]
    words = ["--models", "m", "--images", "-", "--out", "o", "--images", "s3://b/c", "--category", "nut"]
    assert list(job("score").parse(words)[0].images) == ["-", "s3://b/c"]


def test_a_list_option_without_a_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match="require"):
        job("benchmark").parse(["--require"])


@pytest.mark.parametrize("name", ["memory", "size", "student"])
def test_a_null_in_the_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: null\n")
    with pytest.raises(ConfigError, match=f"{name} is null; give a value"):
        recipe_of("--config", str(tmp_path / "run.yaml"))


def test_a_size_is_read_in_decimal_digits_and_nothing_else(tmp_path: Path) -> None:
    for written, message in (
        ("0x140", "size is '0x140'; give 32 to 4096"),
        ("1:30", "not a size"),
        ("1_0", "not a size"),
    ):
        (tmp_path / "run.yaml").write_text(f"size: {written}\n")
        for argv in (["--config", str(tmp_path / "run.yaml")], ["--size", written]):
            with pytest.raises(ConfigError, match=message):
                recipe_of(*argv)
    (tmp_path / "run.yaml").write_text("size: 0400\nteacher_weights: 2026-11-24\n")
    found = recipe_of("--config", str(tmp_path / "run.yaml"))
    assert (found.size, found.teacher_weights) == ("400x400", "2026-11-24")


def test_fractions_are_read_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 4e-4\nweight_decay: 1.0e-3\nmomentum: .5\nloss_factor: 2\n")
    found = recipe_of("--config", str(tmp_path / "run.yaml"))
    assert (found.learning_rate, found.weight_decay, found.momentum, found.loss_factor) == (4e-4, 1e-3, 0.5, 2.0)
