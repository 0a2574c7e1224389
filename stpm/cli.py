"""The command line of a job: options from the command line, YAML files and the environment become dataclasses.

An option's value comes from the command line (a file named by `--config` stands for the options in it, and the last one
given wins), else from the environment (`STPM_<NAME>`), else from the preset, else it is the default.

`Job.run` names a function, which is imported once the options are valid: it imports heavy packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

from stpm import __version__
from stpm.console import LogFormat, start_logging, stop_on_signals, stop_signal
from stpm.errors import GO_ON, ConfigError, StpmError, last_line
from stpm.exit_codes import ALL_DONE, COULD_NOT_RUN, STOPPED, exit_code_for
from stpm.method.recipe import PRESETS, Preset, Recipe
from stpm.names import as_utf8, hide_urls, is_utf8
from stpm.options import Integers, Names, Options, Size, flag, option

log = logging.getLogger(__name__)

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
    bool: "{yes,no}",
    Integers: "INTEGER,INTEGER,...",
    Names: "TEXT,TEXT,...",
    Size: "{HEIGHTxWIDTH,SIDE,auto}",
}
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
_YAML_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class _LogOptions(Options):
    log: LogFormat = option(
        "text", "as text, or each message as a JSON object with time, level, run, job, category and message"
    )


@dataclass(frozen=True)
class _PresetOptions(Options):
    preset: Preset = option(
        "default",
        "where the recipe starts from; `default`: a student (sgd 0.4 with a cosine schedule, batch 2, 5 epochs) and a "
        "memory of normal features, size from the images; `paper`: the student alone, sgd 0.4, batch 32, 100 epochs; "
        "`notebook`: adam 4e-4, batch 4, 20 epochs, pixels from 0 to 1. "
        "The defaults shown are those of the preset chosen",
    )


@dataclass(frozen=True)
class _Option:
    """An option of a job: a field of a dataclass, its type, and its heading in the help."""

    field: dataclasses.Field[Any]
    kind: Any
    heading: str

    @property
    def metavar(self) -> str:
        return _METAVARS.get(self.kind) or f"{{{','.join(get_args(self.kind))}}}"

    def help(self, default: Any) -> str:
        """Return the help text; it names no empty default, which the text itself explains."""
        if isinstance(default, bool):
            default = "yes" if default else "no"
        note = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).removesuffix(".0")
        note = "required" if self.field.metadata["required"] else note and f"default: {note}"
        return f"{self.field.metadata['help']}{note and f' ({note})'}".replace("%", "%%")

    def parse(self, value: Any, where: str = "") -> Any:
        """Parse a value.

        Args:
            value: text, or from a YAML file also a list or an object of texts.
            where: it stands; "": on the command line.

        Raises:
            ConfigError: if the option can have no such value.
        """
        try:
            if isinstance(value, list) and self.kind in (Integers, Names, Size):
                return self.kind(map(_text, value))
            if self.kind is bool:
                return _BOOLEANS[_text(value).lower()]
            if choices := get_args(self.kind):
                return choices[choices.index(value)]
            return self.kind(_text(value))
        except (KeyError, TypeError, ValueError) as error:
            shown = "not valid" if self.field.metadata["is_secret"] else value or "empty"
            what = f"{flag(self.field.name)} is {shown}{where and f' in {where}'}"
            raise ConfigError(hide_urls(f"{what}; give {self.metavar}; see --help")) from error


@dataclass(frozen=True)
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
        without_data: defaults by field name, instead of the preset's, where no data set is given.
    """

    name: str
    description: str
    groups: Mapping[str, type]
    run: str
    example: str
    hidden: tuple[str, ...] = ()
    without_data: Mapping[str, Any] = field(default_factory=dict)

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
        options = self._options()
        words = self._words(argv)
        chosen = _read_values(options, words.kept)
        defaults = {name: each.field.default for name, each in options.items()}
        if "preset" in options:
            defaults |= vars(PRESETS[chosen.get("preset", "default")])
        if not chosen.get("data"):
            defaults |= self.without_data
        if words.help:
            print(self._parser(defaults).format_help(), end="")
            sys.exit(ALL_DONE)
        values = {name: chosen.get(name, defaults[name]) for name in options}
        if words.print_config:
            # What may hold a secret still comes from the environment.
            shown = {name: value for name, value in values.items() if not options[name].field.metadata["is_secret"]}
            # Through JSON, which has no types but YAML's.
            print(yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False, allow_unicode=True), end="")
            sys.exit(ALL_DONE)
        made = [
            kind(**{each.name: values[each.name] for each in dataclasses.fields(kind) if each.name in values})
            for kind in self.groups.values()
        ]
        return [*made, values["log"]]

    def flags(self) -> list[str]:
        """List the options as the command line has them."""
        return list(self._parser({})._option_string_actions)

    def _words(self, argv: Sequence[str]) -> argparse.Namespace:
        """Split a command line into options and their values."""
        if odd := next((word for word in argv if not is_utf8(word)), ""):
            raise ConfigError(f"{hide_urls(as_utf8(odd))}: a name that is not UTF-8; rename it, or name its folder")
        try:
            words, unknown = self._parser({}).parse_known_args(argv, argparse.Namespace(kept=[]))
        except argparse.ArgumentError as error:
            raise ConfigError(hide_urls(f"{error.argument_name}: {error.message}; see --help")) from error
        if unknown and unknown[0].startswith("--"):
            raise _no_option(unknown[0].partition("=")[0], self.flags())
        if unknown:
            raise ConfigError(hide_urls(f"{unknown[0]} belongs to no option; see --help"))
        return words

    def _options(self) -> dict[str, _Option]:
        """List the options by name."""
        kinds: list[tuple[str, type]] = [("options", _LogOptions)]
        for heading, kind in self.groups.items():
            kinds += [(heading, _PresetOptions), (heading, Recipe)] if kind is Recipe else [(heading, kind)]
        return {
            each.name: _Option(each, get_type_hints(kind)[each.name], heading)
            for heading, kind in kinds
            for each in dataclasses.fields(kind)
            if each.name not in self.hidden
        }

    def _parser(self, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
        """Make the parser, with these defaults by field name in its help."""
        options = self._options()
        required = "".join(f" {flag(name)} ..." for name, each in options.items() if each.field.metadata["required"])
        parser = argparse.ArgumentParser(
            prog=f"stpm {self.name}",
            usage=f"stpm {self.name}{required} [options]",
            description=self.description,
            epilog=f"example:\n  {self.example}\n\n{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
            add_help=False,
        )
        group = parser.add_argument_group("options")
        group.add_argument("-h", "--help", action="store_true", help="show this help and exit")
        group.add_argument("--print-config", action="store_true", help="print all options as YAML and exit")
        group.add_argument("--config", action=_Keep, metavar="FILE", help="YAML file that sets any of these options")
        for name, each in options.items():
            if each.heading != group.title:
                group = parser.add_argument_group(each.heading)
            text = each.help(defaults.get(name, each.field.default))
            if each.kind is bool:
                group.add_argument(flag(name), flag(f"no_{name}"), action=_Keep, nargs=0, help=text)
            else:
                group.add_argument(flag(name), action=_Keep, metavar=each.metavar, help=text)
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
        code = exit_code_for(error)
    except OSError as error:
        log.critical("%s", last_line(error))
        code = COULD_NOT_RUN
    sys.exit(code)


class _Keep(argparse.Action):
    """Keep each option with its value, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = "no" if str(option_string).startswith("--no-") else "yes"
        namespace.kept.append((self.dest, values, ""))


def _read_values(options: Mapping[str, _Option], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Return the values that the environment, the command line and the files that they name give, by option."""
    variables = {name: f"STPM_{name.upper()}" for name in ("config", *options)}
    in_environment = [
        (name, os.environ[variable], f"the environment ({variable})")
        for name, variable in variables.items()
        if variable in os.environ
    ]
    values: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for name, text, where in (*in_environment, *kept):
        if name == "config":
            values |= _read_config(text, options)
            continue
        values[name] = options[name].parse(text, where)
        if not where and isinstance(values[name], tuple):
            # A list that the command line has several times adds up.
            values[name] = lists[name] = type(values[name])((*lists.get(name, ()), *values[name]))
    return values


def _read_config(path: str, options: Mapping[str, _Option]) -> Iterator[tuple[str, Any]]:
    """Yield the options in a YAML file, and their values. Each value is read as text: YAML 1.1 has 0x140 for 320.

    Raises:
        ConfigError: if there is no such file, it is no YAML, or an option or a value is not valid. The message quotes
            no line, which may hold a secret.
    """
    try:
        loader = yaml.BaseLoader(Path(path).read_text("utf-8"))
        content = loader.get_single_node()
        if not isinstance(content, yaml.MappingNode):
            raise ConfigError(f"--config {path} has no lines `option: value`")
        for key, node in content.value:
            where, name = f"{path}, line {key.start_mark.line + 1}", str(key.value).replace("-", "_")
            if name not in options:
                raise _no_option(flag(name), map(flag, options), f"{where}: ")
            if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _YAML_NULLS:
                raise ConfigError(f"{flag(name)} is null in {where}; give a value, or leave it out")
            yield name, options[name].parse(loader.construct_object(node, deep=True), where)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}; see --help") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        line = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = getattr(error, "problem", "it has a character that YAML does not allow")
        raise ConfigError(f"--config {path}{line}: {problem}") from None


def _text(value: Any) -> str:
    """Return the value if it is text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _no_option(name: str, known: Iterable[str], where: str = "") -> ConfigError:
    nearest = difflib.get_close_matches(name.strip("-"), [each.strip("-") for each in known], n=1)
    suggestion = f"; did you mean --{nearest[0]}?" if nearest else ""
    return ConfigError(hide_urls(f"{where}there is no option {name}{suggestion}; see --help"))
