"""Options from the command line, the environment, YAML files and presets; help and error messages."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stpm import __version__
from stpm.cli import Job, run_job
from stpm.commands import COMMANDS, main
from stpm.errors import HOW_TO_CONTINUE, ConfigError
from stpm.evaluation.options import BenchmarkOptions
from stpm.fitting.options import CategoryOptions
from stpm.method.recipe import PRESETS, Recipe
from tests.conftest import REPOSITORY
from tests.datasets import make_category


def parse_recipe(*argv: str) -> Recipe:
    return COMMANDS["benchmark"].parse(["--data", "x", *argv])[1]


def test_a_command_line_becomes_dataclasses() -> None:
    line = (
        "--data s3://b/d --out s3://b/o --categories a,b --preset notebook --epochs 3 --seeds=0,1 --seeds 4 "
        "--teacher-weights /w.pth --workers 2 --require mean.image_auroc=0.9 --wait --no-wait "
        "--require=nut.image_auroc=0.8,a.image_recall=0"
    )
    options, recipe, pool, _, gate, _, log = COMMANDS["benchmark"].parse(line.split())
    # A list that is given several times has all values; of another option the last one counts.
    assert options == BenchmarkOptions("s3://b/d", "s3://b/o", ("a", "b"), seeds=(0, 1, 4))
    assert recipe == dataclasses.replace(PRESETS["notebook"], epochs=3, teacher_weights="/w.pth")
    assert (pool.workers, log) == (2, "text")
    assert gate.require == ("mean.image_auroc=0.9", "nut.image_auroc=0.8", "a.image_recall=0")
    words = ["--models", "m", "--images", "a", "--out", "o", "--images", "s3://b/c", "--category", "nut"]
    assert COMMANDS["score"].parse(words)[0].images == ("a", "s3://b/c")


def test_the_command_line_wins_over_environment_and_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: notebook\nepochs: 7\nbatch_size: 9\nlevels: [1, 2]\nteacher_weights: from-file\n")
    assert parse_recipe("--config", str(file)).learning_rate == 4e-4
    monkeypatch.setenv("STPM_EPOCHS", "8")
    monkeypatch.setenv("STPM_SIZE", "128")
    monkeypatch.setenv("STPM_MEMORY_LEVELS", "1")
    recipe = parse_recipe("--config", str(file), "--batch-size", "11", "--memory-levels", "2")
    assert (recipe.batch_size, recipe.epochs, recipe.size, recipe.memory_levels) == (11, 7, "128x128", (2,))
    monkeypatch.setenv("STPM_CONFIG", str(file))
    assert (parse_recipe().learning_rate, parse_recipe().epochs) == (4e-4, 8)
    assert (recipe.levels, recipe.teacher_weights) == ((1, 2), "from-file")


def test_defaults_are_those_of_the_preset_or_without_data_of_the_demo_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_recipe() == PRESETS["default"]
    assert parse_recipe("--preset", "paper") == PRESETS["paper"]
    demo = COMMANDS["benchmark"].parse(["--epochs", "2"])[1]
    assert demo == dataclasses.replace(
        PRESETS["default"], teacher="demo", size="128", group_from="{group}_{name}", epochs=2
    )
    for name, wanted in (
        ("fit", "default: 0.0004)"),
        ("benchmark", "default: resnet18.tv_in1k; without --data: demo)"),
    ):
        with pytest.raises(SystemExit):
            COMMANDS[name].parse(["--preset", "notebook", "--help"])
        assert wanted in " ".join(capsys.readouterr().out.split())


def test_no_secret_is_printed_or_accepted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STPM_WEBHOOK", "https://host/SECRET")
    argv = ["--models", "m", "--images", "{date}", "--out", "o"]
    assert COMMANDS["nightly"].parse(argv)[1].webhook == "https://host/SECRET"
    with pytest.raises(SystemExit):
        COMMANDS["nightly"].parse([*argv, "--print-config"])
    assert "webhook" not in capsys.readouterr().out
    for option in ("--models", "--images", "--allow"):
        with pytest.raises(ConfigError, match=r"https://host/\.\.\.: this URI holds a user or password") as caught:
            COMMANDS["nightly"].parse([*argv, option, "https://me:SECRET@host/{date}"])
        assert "SECRET" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"--config https://host/\.\.\. cannot be read: No such file"):
        COMMANDS["nightly"].parse(["--config", "https://me:SECRET@host/x?key=SECRET"])
    for option in ("--data", "--out", "--teacher-weights"):
        with pytest.raises(ConfigError, match=r"s3://bucket/\.\.\.: this URI holds a user or password"):
            COMMANDS["benchmark"].parse([option, "s3://key:SECRET@bucket/x"])


FILE_ERRORS = [
    ("nightly", b"STPM_WEBHOOK=https://host/SECRET\nSTPM_WEBHOOK_SECRET=SECRET\n", "FILE has no lines `option: value`"),
    ("nightly", b"webhook: [https://host/SECRET]\n", "--webhook is not valid in FILE, line 1; give TEXT; see --help"),
    ("nightly", b"top: 1\nwebhook: 'https://host/SECRET\n", "--config FILE, line 3: found unexpected end of stream"),
    ("nightly", b"webhook: https://host/SECRET: x\n", "FILE, line 1: mapping values are not allowed here"),
    ("nightly", b"webhook: \0SECRET\n", "--config FILE: it has a character that YAML does not allow"),
    ("nightly", "# Prüfung\n".encode("cp1252"), "--config FILE is not UTF-8; save it as UTF-8"),
    (
        "fit",
        b"epochs: 1\nweight_decey: 0\n",
        "FILE, line 2: there is no option --weight-decey; did you mean --weight-decay?",
    ),
    ("fit", b"categories: a\nepochs: 1.5\n", "--epochs is 1.5 in FILE, line 2; give INTEGER; see --help"),
    ("fit", b"config: other.yaml\n", "FILE, line 1: a file cannot name another one; give --config several times"),
    ("fit", b"wait: on\n", "--wait is on in FILE, line 1; give {yes,no}; see --help"),
    ("fit", b"levels: {a: 1}\n", "--levels is {'a': '1'} in FILE, line 1; give INTEGER,INTEGER,...; see --help"),
    ("fit", b"learning_rate: .inf\n", "--learning-rate is .inf in FILE, line 1; give NUMBER; see --help"),
    ("fit", b"learning_rate: " + b"9" * 400, f"--learning-rate is {200 * '9'}… in FILE, line 1; give NUMBER; see"),
    ("nightly", b"? {webhook: SECRET}\n: 1\n", "FILE, line 1: an option's name is text"),
    ("fit", b"categories: [a, ~]\n", "--categories is null in FILE, line 1; give a value, or leave it out"),
    ("fit", b"categories: " + b"[" * 3000, "FILE is nested too deeply; give `option: value` lines"),
    ("fit", b"size: 0x140\n", "--size is '0x140'; give 32 to 4096"),
    ("fit", b"size: 1:30\n", "--size is 1:30 in FILE, line 1; give {HEIGHTxWIDTH,SIDE,auto}; see --help"),
    *(
        ("fit", f"pixels: 9000\ncategories:\n  nut: {{}}\n  pill: {entry}\n".encode(), message)
        for entry, message in (
            ("{pixls: 1}", "FILE, line 4, category pill: there is no option --pixls; did you mean --pixels?"),
            ("{seed: 1}", "FILE, line 4, category pill: there is no option --seed"),
            ("{pixels: many}", "--pixels is many in FILE, line 4, category pill; give INTEGER; see --help"),
            ("{pixels: 9}", "FILE, line 4, category pill: --pixels is 9; give at least 1024 and at most 16777216"),
            ("{student: none, memory: 0}", "FILE, line 4, category pill: --student is 'none'; give --memory too"),
            ("{threshold: 1e39}", "FILE, line 4, category pill: --threshold is 1e+39; give at least -3e+38"),
            ("{threshold: ~}", "--threshold is null in FILE, line 4, category pill; give a value, or leave it out"),
            ("{teacher_weights: 's3://me:SECRET@b/w.pth'}", "FILE, line 4, category pill: s3://b/...: this URI holds"),
            ("{? [a] : 1}", "FILE, line 4, category pill: an option's name is text"),
            ("400000", "FILE, category pill has no lines `option: value`"),
            ("", "category pill is null in FILE, line 4; give a value, or leave it out"),
            ("{}\n  nut: {}", "FILE, line 5: category nut is there twice"),
            ("{}\n  '*': maybe", "FILE, category * has no lines `option: value`"),
        )
    ),
    ("fit", b"categories: {'*': no}\n", 'FILE: categories has "*": no alone, which leaves none; name those to fit'),
    # Only a job that fits has options of single categories.
    ("models", b"categories: {pill: {}}\n", "--categories is {'pill': {}} in FILE, line 1; give TEXT,TEXT,..."),
    *(
        ("fit", f"{name}: {null}\n".encode(), f"--{name} is null in FILE, line 1; give a value, or leave it out")
        for name, null in (("memory", "null"), ("size", "~"), ("student", ""), ("preset", "Null"))
    ),
]


def test_two_files_with_options_of_single_categories_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("categories: {a: {pixels: 400000}, '*': no}")
    files[1].write_text("categories: {b: {pixels: 500000}}")
    with pytest.raises(ConfigError, match=r"b\.yaml: another file has options by category, too; join them"):
        COMMANDS["fit"].parse([word for file in files for word in ("--config", str(file))])


@pytest.mark.parametrize(("name", "content", "message"), FILE_ERRORS, ids=range(len(FILE_ERRORS)))
def test_an_error_in_a_file_names_its_line_alone(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        COMMANDS[name].parse([*(["--data=x", "--models=m"] if name == "fit" else []), "--config", str(file)])
    assert message.replace("FILE", str(file)) in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_an_error_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STPM_IMAGES", os.fsdecode(b"a\xff"))
    with pytest.raises(ConfigError, match=r"^--images: a%FF is not UTF-8; rename it, or name its folder$"):
        COMMANDS["score"].parse([])
    monkeypatch.setenv("STPM_WAIT", "1")
    with pytest.raises(ConfigError, match=r"--wait is 1 in the environment \(STPM_WAIT\); give {yes,no}; see --help"):
        parse_recipe()


@pytest.mark.parametrize("argv", [["--webhook=", "https://host/SECRET"], [os.fsdecode(b"https://host/SECRET\xff")]])
def test_an_error_in_a_command_line_shows_no_url(argv: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        COMMANDS["nightly"].parse(["--models", "m", "--images", "{date}", "--out", "o", *argv])
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        *(f"--preset {preset}" for preset in PRESETS),
        "--preset notebook --epochs 5 --categories a,b --seeds 0,1",
        "--student none --memory 100 --memory-levels 1,3 --smoothing 4 --top-fraction 0.01",
        "--memory 0 --fusion sum",
        "--size 640x256",
        "--preset paper --size auto",
    ],
)
def test_a_printed_configuration_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    argv = ["--data", "x", *line.split()]
    with pytest.raises(SystemExit):
        COMMANDS["benchmark"].parse([*argv, "--print-config"])
    printed = capsys.readouterr().out
    values = yaml.load(printed, yaml.BaseLoader)  # noqa: S506  all values as text
    assert {field.name for field in dataclasses.fields(Recipe)} - {"seed"} <= values.keys()
    for name, value in zip(argv[::2], argv[1::2], strict=True):
        written = values[name.removeprefix("--").replace("-", "_")]
        assert (",".join(written) if isinstance(written, list) else written) in (value, f"{value}.0")
    (tmp_path / "c.yaml").write_text(printed)
    assert COMMANDS["benchmark"].parse(["--config", str(tmp_path / "c.yaml")]) == COMMANDS["benchmark"].parse(argv)


@pytest.mark.parametrize(
    "argv", [[], ["--categories", "nut,bolt"], ["--preset", "paper", "--pixels=3000", "--seeds=1,2"]]
)
@settings(max_examples=20, deadline=None)
@given(
    entries=st.dictionaries(
        st.sampled_from(["nut", "bolt", "no", "007", "Müller: 1"]),
        st.fixed_dictionaries(
            {},
            optional={
                "pixels": st.integers(1024, 9999),
                "size": st.sampled_from(["auto", "640x256"]),
                "levels": st.sampled_from([[1, 2], [2, 3]]),
                "memory_levels": st.just([2]),
                "zero_init_residual": st.booleans(),
                "student_weight": st.floats(0.01, 0.99),
                "group_from": st.sampled_from(["{group}_{name}", ""]),
                "threshold": st.floats(-9, 9),
            },
        ),
        min_size=1,
    ),
    others=st.booleans(),
)
def test_options_of_single_categories_are_typed_and_above_all_others_and_print_and_read_back(
    argv: list[str], entries: dict[str, dict[str, Any]], others: bool
) -> None:
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as printed:
        first, second = Path(folder, "first.yaml"), Path(folder, "second.yaml")
        first.write_text(yaml.safe_dump({"categories": entries | ({} if others else {"*": "no"})}))
        line = ["--data", "x", "--config", str(first), *argv]
        options, recipe, *rest = COMMANDS["benchmark"].parse(line)
        with pytest.raises(SystemExit):
            COMMANDS["benchmark"].parse([*line, "--print-config"])
        second.write_text(printed.getvalue())
        again, *rest_again = COMMANDS["benchmark"].parse(["--config", str(second)])
    chosen = "--categories" in argv
    assert sorted(options.categories) == sorted(["nut", "bolt"] if chosen else [] if others else entries)
    assert {each.category for each in options.by_category} == {*entries}
    for each in options.by_category:
        own = {**entries[each.category]}
        assert each.threshold == own.pop("threshold", None)
        expected = dataclasses.replace(recipe, **own)
        assert (each.recipe, repr(each.recipe), each.file) == (expected, repr(expected), str(first))
    assert (rest_again, again.categories) == ([recipe, *rest], options.categories)
    kept = {
        each.category: dataclasses.replace(each, file=str(second))
        for each in options.by_category
        if not chosen or each.category in ("nut", "bolt")
    }
    # A category that is chosen has its entry, if an empty one.
    assert {each.category: each for each in again.by_category} == {
        name: kept.get(name, CategoryOptions(name, recipe, str(second))) for name in options.categories or kept
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "big"], "size is big; give {HEIGHTxWIDTH,SIDE,auto}; see --help"),
        (["--epochs", "0"], "epochs is 0; give at least 1"),
        (["--tolerance", "-1"], "tolerance is -1.0; give at least 0"),
        (["--model-ram-gib", "inf"], "model-ram-gib is inf; give NUMBER"),
        (["--image-seconds", "1e10"], "image-seconds is 10000000000.0; give more than 0 and at most 86400"),
        (["--no-such-option", "1"], "there is no option --no-such-option; see --help"),
        (["--epoch=1"], "there is no option --epoch; did you mean --epochs?"),
        (["--epochs", "1.5"], "epochs is 1.5; give INTEGER; see --help"),
        (["--student", "nne"], "student is nne; give {stpm,none}"),
        (["--preset", "secret"], "preset"),
        (["--seeds", "0,0"], "seeds is '0,0'; give each seed once"),
        (["--seeds", "a"], "seeds is a; give INTEGER,INTEGER,...; see --help"),
        *(
            (["--false-alarm-rate", rate], f"false-alarm-rate is {float(rate)}; give more than 0 and less than 1")
            for rate in ("0", "1")
        ),
        (["--config", "/no/such/file.yaml"], "--config /no/such/file.yaml cannot be read: No such file"),
        (["--require"], "--require: expected one argument; see --help"),
        (["--out="], "--out is empty; give a folder or a URI"),
        (["x"], "x belongs to no option; see --help"),
    ],
)
def test_an_invalid_option_is_an_error_of_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        COMMANDS["benchmark"].parse(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search("<class|Literal|Parser key", str(caught.value))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_in_its_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS[name].parse(["--help"])
    shown = capsys.readouterr().out
    required = 0
    for title, kind in COMMANDS[name].groups.items():
        # Without spaces: lines are broken at hyphens too.
        group = "".join(shown.split(f"\n{title}:\n")[1].split("\n\n")[0].split())
        for field in dataclasses.fields(kind):
            if field.metadata and field.name not in COMMANDS[name].hidden:
                assert f"--{field.name.replace('_', '-')}" in group
                assert "".join(field.metadata["help"].split()) in group
                assert not field.metadata["required"] or f"--{field.name} ..." in shown.splitlines()[0]
                required += field.metadata["required"]
    assert " ".join(shown.split()).count("(required)") == required
    assert not re.search("<class|Literal|Names|Integers|None|False|True", shown)
    assert shown.count(f"example:\n  stpm {name} ") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_the_help_parses_and_the_jobs_function_takes_the_options(name: str) -> None:
    program, command, *argv = COMMANDS[name].example.split()
    assert (program, command) == ("stpm", name)
    COMMANDS[name].parse(argv)
    *kinds, returned = get_type_hints(resolve_name(COMMANDS[name].run)).values()
    assert kinds == list(COMMANDS[name].groups.values())
    assert returned is int


def run_main(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run `stpm` with these words; return its exit code, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["stpm", *words])
    code = main()
    return code, "".join(capsys.readouterr())


def test_stpm_lists_its_commands_and_says_what_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, expected in (([], 1), (["--help"], 0), (["-h"], 0)):
        code, shown = run_main(words, capsys, monkeypatch)
        assert code == expected
        listed = dict(re.findall(r"^  (\w+) +(.+)$", shown, flags=re.MULTILINE))
        assert listed == {name: job.description for name, job in COMMANDS.items()}
    none = "error: there is no command {}; there are " + f"{', '.join(COMMANDS)}\n"
    for word, expected, line in (
        ("--version", 0, f"stpm {__version__}\n"),
        ("scroe", 1, none.format("scroe")),
        ("--webhook=https://host/SECRET", 1, none.format("--webhook=https://host/...")),
    ):
        assert run_main([word], capsys, monkeypatch) == (expected, line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stpm n", ["nightly"]),
        ("stpm ", list(COMMANDS)),
        ("stpm score --mod", ["--models", "--model-ram-gib"]),
        ("stpm scroe --mod", []),
    ],
)
def test_bash_completes_commands_and_options(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    *_, previous, word = line.split(" ")
    assert run_main(["--complete", "stpm", word, previous], capsys, monkeypatch)[1].split() == expected


def test_each_script_is_a_command() -> None:
    scripts = sorted((REPOSITORY / "jobs").iterdir())
    assert [script.name for script in scripts if script.is_file()] == [f"{name}.py" for name in sorted(COMMANDS)]
    for name in COMMANDS:
        words = [sys.executable, REPOSITORY / "jobs" / f"{name}.py", "--help"]
        shown = subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
        assert shown.startswith(f"usage: stpm {name} ")


SCORE = ["score", "--models", "m", "--category", "nut", "--images"]
FIT = ["fit", "--data", "data", "--models", "m"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        *(([name], 1, " missing; see --help") for name in ("fit", "score", "evaluate", "nightly")),
        ([*SCORE, "i", "--out", "file/run"], 1, "file is a file"),
        ([*FIT[:3], "--models", "file"], 1, "file is a file"),
        (["benchmark", "--data", "data", "--out", "file/run"], 1, "file is a file"),
        (["evaluate", "--run", "d", "--out", "o"], 3, "d: no scores here"),
        ([*SCORE, os.fsdecode(b"\xff"), "--out", "o"], 1, "--images: %FF is not UTF-8; rename it"),
        ([*SCORE, "nonsense://i", "--out", "nonsense://o"], 1, "use a local path, s3://"),
        (["fit", "--data", "nowhere", "--models", "m"], 3, "nowhere: no such folder"),
        ([*SCORE, "data", "--out", "o"], 3, "no model for category"),
        (["benchmark", "--data", "nowhere", "--out", "o"], 3, "nowhere: no such folder"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_category("data", "nut", train=2, good=0, defects=0)
    Path("file").write_bytes(b"")
    with pytest.raises(SystemExit) as exit_:
        run_job(COMMANDS[words[0]], words[1:])
    assert exit_.value.code == code
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out
    assert not list(Path().rglob("model.json"))


def fill_the_disk() -> int:
    raise OSError(28, "No space left on device", "/data/x")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_error_of_the_disk_is_a_line_or_a_json_object(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_job(Job("full", "", {}, f"{__name__}:fill_the_disk", ""), ["--log", log_format])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    message = f"[Errno 28] No space left on device: '/data/x'; make room on that disk; {HOW_TO_CONTINUE}"
    if log_format == "text":
        assert err == f"error: {message}\n"
    else:
        line = json.loads(out.splitlines()[-1])
        assert (err, line["job"], line["level"], line["message"]) == ("", "full", "error", message)


def test_a_list_option_replaces_the_file_before_it_and_is_replaced_by_the_file_after_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seeds: [7, 8]\n")
    for argv, seeds in (
        (["--config", str(file)], [7, 8]),
        (["--config", str(file), "--seeds", "1", "--seeds", "2"], [1, 2]),
        (["--seeds", "1", "--config", str(file)], [7, 8]),
    ):
        assert list(COMMANDS["benchmark"].parse(["--data", "x", *argv])[0].seeds) == seeds


def test_a_value_in_the_file_is_text_that_its_option_parses(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "data: 0400\ncategories: [yes, 007]\nwait: yes\nsize: 0400\nteacher-weights: 2026-11-24\n"
        "learning_rate: 4e-4\nweight_decay: 1.0e-3\nmomentum: .5\nloss_factor: 2\n"
    )
    options, found, *_ = COMMANDS["benchmark"].parse(["--config", str(tmp_path / "run.yaml")])
    assert (options.data, options.categories, options.wait) == ("0400", ("yes", "007"), True)
    assert (found.size, found.teacher_weights) == ("400x400", "2026-11-24")
    assert (found.learning_rate, found.weight_decay, found.momentum, found.loss_factor) == (4e-4, 1e-3, 0.5, 2.0)


def test_the_end_of_the_interpreter_changes_no_exit_code() -> None:
    """This object aborts the process when the modules are taken down, as threads of pyarrow may that hold bytes."""
    script = """if True:
        import atexit, os, sys
        from stpm.commands import main
        class Abort:
            __del__ = lambda self: os.abort()
        abort = Abort()
        atexit.register(print, "handlers run")
        main()
    """
    words = [sys.executable, "-c", script, "models", "--models", "/nowhere"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (3, ["handlers run"])
    without = subprocess.run(["/bin/sh", "-c", '"$@" 2>&-', "sh", *words], stdout=subprocess.PIPE, check=False)
    assert without.returncode == 3
