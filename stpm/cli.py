"""The command line of a job: options from the command line, YAML files and the environment become dataclasses.

An option's value comes from the command line (a file named by `--config` stands for the options in it, and the last one
given wins), else from the environment (`STPM_<NAME>`), else from the preset, else it is the default.

`Job.run` names a function, which is imported once the options are valid: it imports heavy packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_loader
from jsonargparse.typing import register_type

from stpm import __version__
from stpm.console import (
    COULD_NOT_RUN,
    NOTHING_DONE,
    SOME_FAILED,
    STOPPED,
    LogFormat,
    start_logging,
    stop_on_signals,
    stop_signal,
)
from stpm.errors import GO_ON, ConfigError, CutOffError, DataError, ModelError, StpmError, last_line
from stpm.method.recipe import PRESETS, Preset, Recipe
from stpm.names import as_utf8, hide_urls, is_utf8
from stpm.options import Integers, Names, Size, flag

log = logging.getLogger(__name__)

_PRESET_HELP = (
    "where the recipe starts from; `default`: a student (sgd 0.4 with a cosine schedule, batch 2, 5 epochs) and a "
    "memory of normal features, size from the images; `paper`: the student alone, sgd 0.4, batch 32, 100 epochs; "
    "`notebook`: adam 4e-4, batch 4, 20 epochs, pixels from 0 to 1. "
    "The defaults shown are those of the preset chosen (default: default)"
)
_LOG_HELP = "as text, or each message as a JSON object with time, level, run, job, category and message (default: text)"
_EPILOG = (
    "Each option can also be set in a YAML file (--config) or in the environment (STPM_EPOCHS=20 for --epochs 20).\n"
    "Precedence, highest first: the command line and --config files (of several, the last one given); the\n"
    "environment; the preset; the defaults."
)
# How the help shows a value of each type; a Literal is shown as its choices.
_METAVARS = {
    int: "INTEGER",
    float: "NUMBER",
    str: "TEXT",
    Integers: "INTEGER,INTEGER,...",
    Names: "TEXT,TEXT,...",
    Size: "HEIGHTxWIDTH",
}
# Any other error is one of the options, or of what the job needs to run.
_EXIT_CODES = {CutOffError: SOME_FAILED, DataError: NOTHING_DONE, ModelError: NOTHING_DONE}
# Options that print something and exit. The first of two parses leaves them out: it finds the preset.
_PRINTING = ("--print-config", "--help", "-h")


@dataclasses.dataclass(frozen=True)
class Job:
    """A command: its options, as dataclasses, and the function that takes one of each.

    A job with a Recipe among its options also has `--preset`, which sets the recipe's defaults.

    Args:
        name: of the command.
        description: of the job, in one line.
        groups: the option dataclasses by their headings in the help; no two have a field of the same name.
        run: name of the function, as `package.module:function`. It takes an instance of each dataclass, and returns
            the exit code.
        example: a command line.
        hidden: fields that are not the user's to set.
        defaults: makes the defaults that depend on other options, from a first parse.
    """

    name: str
    description: str
    groups: Mapping[str, type]
    run: str
    example: str
    hidden: tuple[str, ...] = ()
    defaults: Callable[[Namespace], Mapping[str, Any]] = lambda values: {}

    def __call__(self, argv: Sequence[str]) -> int:
        """Parse the options, run the job, and return its exit code. Raises StpmError."""
        *options, log_format = self.parse(argv)
        start_logging(self.name, log_format)
        log.info("%s of stpm %s starts", self.name, __version__)
        code: int = resolve_name(self.run)(*options)
        return code

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """Make an instance of each option dataclass, and the log's format.

        Raises:
            ConfigError: if an option is unknown, or a value is not valid.
        """
        for word in argv:
            if not is_utf8(word):
                shown = hide_urls(as_utf8(word))
                raise ConfigError(f"{shown}: a name that is not UTF-8; rename it, or name its folder")
        try:
            values = self.parser({}).parse_args([word for word in argv if not word.startswith(_PRINTING)])
            defaults: dict[str, Any] = {}
            if "preset" in values:
                _check_not_null("preset", values.preset)
                defaults = dataclasses.asdict(PRESETS[values.preset])
            values = self.parser(defaults | dict(self.defaults(values))).parse_args(argv)
        except OverflowError as error:
            raise ConfigError(f"a number is too large: {error}; see --help") from error
        except UnicodeDecodeError as error:
            raise ConfigError("the file of --config is not UTF-8; save it as UTF-8") from error
        return [*(_make(kind, values) for kind in self.groups.values()), values.log]

    def flags(self) -> list[str]:
        """List the options as the command line has them."""
        actions = self.parser({})._actions
        return [flag for each in actions if each.help != argparse.SUPPRESS for flag in each.option_strings]

    def parser(self, defaults: Mapping[str, Any]) -> ArgumentParser:
        """Make the parser.

        Args:
            defaults: by field name, instead of the dataclasses' own.
        """
        fields = [field for kind in self.groups.values() for field in dataclasses.fields(kind)]
        required = "".join(f" {flag(field.name)} ..." for field in fields if field.metadata["required"])
        parser = _Parser(
            prog=f"stpm {self.name}",
            usage=f"stpm {self.name}{required} [options]",
            description=self.description,
            epilog=f"example:\n  {self.example}\n\n{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            env_prefix="STPM",
            default_env=True,
            allow_abbrev=False,
            print_config="--print-config",
        )
        parser.secrets = tuple(field.name for field in fields if field.metadata["is_secret"])
        parser.add_argument(
            "--config", action="config", metavar="FILE", help="YAML file that sets any of these options"
        )
        parser.add_argument("--log", type=LogFormat, default="text", help=_LOG_HELP)
        for title, kind in self.groups.items():
            group = parser.add_argument_group(title)
            if kind is Recipe:
                group.add_argument("--preset", type=Preset, default="default", help=_PRESET_HELP)
            hints = get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if field.name not in self.hidden:
                    _add_option(group, field, hints[field.name], defaults.get(field.name, field.default))
        return parser


def run_job(job: Job, argv: Sequence[str]) -> NoReturn:
    """Run a job as this process, with the words after its name: exit with its code, and log an error as one line.

    Standard input and output accept bytes that are not UTF-8; the output escapes them.
    """
    stop_on_signals()
    # Errors in the options are logged before the format that the options choose is known.
    start_logging(job.name, "text")
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        code = job(argv)
    except KeyboardInterrupt:
        log.info(f"stopped by {stop_signal().name}: {GO_ON}")
        code = STOPPED + stop_signal()
    except StpmError as error:
        log.critical("%s", error)
        code = next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), COULD_NOT_RUN)
    except OSError as error:
        log.critical("%s", last_line(error))
        code = COULD_NOT_RUN
    sys.exit(code)


def _add_option(group: Any, field: dataclasses.Field[Any], kind: Any, default: Any) -> None:
    name = flag(field.name)
    note = "required" if field.metadata["required"] else _default_text(default)
    text = f"{field.metadata['help']}{f' ({note})' if note else ''}".replace("%", "%%")
    metavar = _METAVARS.get(kind) or f"{{{','.join(get_args(kind))}}}"
    if kind is bool:
        group.add_argument(name, action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=default, help=text)
    elif kind in _LISTS:
        group.add_argument(name, type=_LISTS[kind], action=_Extend, default=default, help=text, metavar=metavar)
    else:
        group.add_argument(name, type=kind, default=default, help=text, metavar=metavar)


def _default_text(default: Any) -> str:
    """Write a default for the help; "" for an empty one, which the option's own text explains."""
    if isinstance(default, bool):
        return f"default: {'yes' if default else 'no'}"
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).removesuffix(".0")
    return f"default: {text}" if text else ""


def _make(kind: type, values: Namespace) -> Any:
    """Make an instance of an option dataclass from the parsed values."""
    names = {field.name for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in vars(values).items() if name in names}
    for name, value in chosen.items():
        _check_not_null(name, value)
    return kind(**chosen)


def _check_not_null(name: str, value: Any) -> None:
    if value is None:
        raise ConfigError(f"{flag(name)} is null; give a value, or leave it out")


class _Parser(ArgumentParser):
    """A parser whose errors are ConfigErrors in the user's words, instead of Python's."""

    # Names of the options that may hold a secret.
    secrets: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        if "Unexpected config:" in text:
            # The message has the whole content, which may hold secrets.
            text = "the file of --config has no lines `option: value`"
        elif unknown := re.match(r"unrecognized arguments: --([^\s=]+)|Option '(\w+)' is not accepted", text):
            text = self._unknown(unknown[1] or unknown[2].replace("_", "-"))
        elif invalid := re.match(r"argument --(\S+): invalid \S+ value: (.*)", text):
            text = self._invalid(f"--{invalid[1]}", invalid[2])
        elif invalid := re.match(r'Parser key "(\w+)": (?:Not of type \w+: )?(.*)', text):
            reason, _, value = invalid[2].partition(" Got value: ")
            name = flag(invalid[1])
            text = self._invalid(name, value) if value else f"{name}: {reason}"
        raise ConfigError(f"{hide_urls(text)}; see --help") from ex

    def dump(self, cfg: Namespace, **options: Any) -> str:
        """Write options as YAML, without those that may hold a secret: they still come from the environment."""
        shown = cfg.clone()
        for name in self.secrets:
            shown.pop(name, None)
        text: str = super().dump(shown, **options)
        return text

    def _unknown(self, name: str) -> str:
        known = [flag.lstrip("-") for flag in self._option_string_actions]
        nearest = difflib.get_close_matches(name, known, n=1)
        return f"there is no option --{name}" + (f"; did you mean --{nearest[0]}?" if nearest else "")

    def _invalid(self, name: str, value: str) -> str:
        shown = "not valid" if name in map(flag, self.secrets) else value
        return f"{name} is {shown}; give {self._option_string_actions[name].metavar}"


class _Extend(argparse.Action):
    """Let an option be given several times: the values add up. jsonargparse would keep the last alone.

    The first one replaces what a file or the environment gave. A parser, and so this object, parses once.
    """

    _values: tuple[Any, ...] = ()

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        self._values += values
        setattr(namespace, self.dest, type(values)(self._values))


def _items(value: Any) -> list[Any]:
    """Split `a,b`, as the command line has it; a YAML file may have a list."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else list(value)


def _integers(value: Any) -> Integers:
    try:
        return Integers(int(item) for item in _items(value))
    except ValueError as error:
        raise ValueError(f"{value!r} is not INTEGER,INTEGER,...") from error


def _names(value: Any) -> Names:
    return Names(str(item) for item in _items(value))


_LISTS = {Integers: _integers, Names: _names}
register_type(Size)


class _Yaml(yaml.BaseLoader):
    """YAML in which every value but null is text, which its option parses: YAML 1.1 would read size 0x140 as 320."""


_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Yaml)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        # The error's own text quotes the line, which may hold a secret.
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise yaml.YAMLError(f"{error.problem}{line}") from None


set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))
