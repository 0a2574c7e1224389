"""The command line of a job: options from the command line, YAML files and the environment become dataclasses.

An option's value comes from the command line (a file named by `--config` stands for the options in it, and the last one
given wins), else from the environment (`STPM_<NAME>`), else from the preset, else it is the default. For one category,
what a file says of it in a mapping `categories:` is above all of these.

`Job.run` names a function, which is imported once the options are valid: it imports heavy packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

from stpm import __version__
from stpm.console import LogFormat, start_logging, stop_on_signals, stop_signal
from stpm.errors import HOW_TO_CONTINUE, ConfigError, StpmError, last_line
from stpm.exit_codes import ALL_DONE, COULD_NOT_RUN, SOME_FAILED, STOPPED, exit_code_for
from stpm.fitting.options import CategoryOptions
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
# Characters of a value in a message.
_MAX_SHOWN = 200
# An entry of `categories:` that leaves out the categories without an entry.
_NO_OTHERS = ("*", "no")
_YAML_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class _GeneralOptions(Options):
    config: str = option("", "YAML file that sets any of these options")
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


class _Option(argparse.Action):
    """An option of a job, from a field of a dataclass. The parser keeps its values in their order."""

    def __init__(self, option_strings: Sequence[str], dest: str, field: dataclasses.Field[Any], kind: Any) -> None:
        metavar = _METAVARS.get(kind) or f"{{{','.join(get_args(kind))}}}"
        super().__init__(option_strings, dest, nargs=0 if kind is bool else None, metavar=metavar)
        self.kind, self.field = kind, field

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.kind is bool:
            values = "no" if str(option_string).startswith("--no-") else "yes"
        namespace.kept.append((self.dest, values, ""))

    def explain(self, default: Any, without_data: Any = "") -> None:
        """Make the help text. It names no empty default, which the option's own text explains."""
        if isinstance(default, bool):
            default = "yes" if default else "no"
        note = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).removesuffix(".0")
        note = "required" if self.field.metadata["required"] else note and f"default: {note}"
        note = "; ".join(filter(None, (note, without_data and f"without --data: {without_data}")))
        self.help = f"{self.field.metadata['help']}{note and f' ({note})'}".replace("%", "%%")

    def parse(self, value: Any, where: str = "") -> Any:
        """Parse a value: text, or from a YAML file also a list or an object of texts.

        Raises:
            ConfigError: if the option can have no such value. The message says where it stands, unless on the command
                line ("").
        """
        texts = value if isinstance(value, list) else [value]
        if odd := next((each for each in texts if isinstance(each, str) and not is_utf8(each)), ""):
            shown = "its value" if self.field.metadata["is_secret"] else hide_urls(as_utf8(odd))
            raise ConfigError(f"{flag(self.field.name)}: {shown} is not UTF-8; rename it, or name its folder")
        try:
            if isinstance(value, list) and self.kind in (Integers, Names, Size):
                return self.kind(map(_text, value))
            if self.kind is bool:
                return _BOOLEANS[_text(value).lower()]
            if choices := get_args(self.kind):
                return choices[choices.index(value)]
            return (_finite if self.kind is float else self.kind)(_text(value))
        except (KeyError, TypeError, ValueError) as error:
            shown = "not valid" if self.field.metadata["is_secret"] else _shown(value)
            what = f"{flag(self.field.name)} is {shown}{where and f' in {where}'}"
            raise ConfigError(hide_urls(f"{what}; give {self.metavar}; see --help")) from error


@dataclass(frozen=True)
class Job:
    """A command: its options, as dataclasses, and the function that takes one of each.

    A job with a Recipe among its options also has `--preset`, which sets the recipe's defaults. The description is one
    line, and the example a command line.

    Args:
        groups: the option dataclasses by their headings in the help; no two have a field of the same name.
        run: name of the function, as `package.module:function`. It takes an instance of each dataclass, and returns
            the exit code.
        hidden: fields that are not the user's to set.
        without_data: defaults by field name, instead of the preset's, where no data set is given.
        check: an option, and the name of a function that takes its absolute URI and raises StpmError if nothing is
            there: the modules that `run` needs take many seconds to import.
    """

    name: str
    description: str
    groups: Mapping[str, type]
    run: str
    example: str
    hidden: tuple[str, ...] = ()
    without_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: tuple[str, str] | None = None

    def __call__(self, argv: Sequence[str]) -> int:
        """Parse the options, run the job, and return its exit code. Raises StpmError."""
        *options, log_format = self.parse(argv)
        start_logging(self.name, log_format)
        log.info("%s of stpm %s starts", self.name, __version__)
        if self.check and (value := getattr(options[0], self.check[0])):
            from stpm import storage

            resolve_name(self.check[1])(storage.absolute(value))
        code: int = resolve_name(self.run)(*options)
        return code

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """Make an instance of each option dataclass, and the log's format.

        Raises:
            ConfigError: if an option is unknown, or a value is not valid.
        """
        parser, options = self._parser()
        try:
            words, unknown = parser.parse_known_args(argv, argparse.Namespace(kept=[]))
        except argparse.ArgumentError as error:
            raise ConfigError(hide_urls(f"{error.argument_name}: {error.message}; see --help")) from error
        if unknown and unknown[0].startswith("--"):
            raise _no_option(unknown[0].partition("=")[0], self.flags())
        if unknown:
            raise ConfigError(hide_urls(f"{unknown[0]} belongs to no option; see --help"))
        chosen = _read_values(options, words.kept)
        entries: dict[str, _Entry] = chosen.pop("by_category", {})
        values: dict[str, Any] = {name: each.field.default for name, each in options.items()}
        if "preset" in options:
            values |= vars(PRESETS[chosen.get("preset", "default")])
        if words.help:
            for name, each in options.items():
                each.explain(values[name], self.without_data.get(name, ""))
            print(parser.format_help(), end="")
            sys.exit(ALL_DONE)
        values |= chosen if chosen.get("data") else {**self.without_data, **chosen}
        if words.print_config:
            # What may hold a secret still comes from the environment.
            shown = {name: values[name] for name, each in options.items() if not each.field.metadata["is_secret"]}
            del shown["config"]
            if entries:
                names = shown["categories"]
                every = {name: entries[name].values if name in entries else {} for name in names or entries}
                shown["categories"] = every | dict([_NO_OTHERS] if names else [])
            # Through JSON, which has no types but YAML's.
            print(yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False, allow_unicode=True), end="")
            sys.exit(ALL_DONE)
        values["by_category"] = tuple(entry.options(name, values) for name, entry in entries.items())
        made = [
            kind(**{each.name: values[each.name] for each in dataclasses.fields(kind) if each.name in values})
            for kind in self.groups.values()
        ]
        return [*made, values["log"]]

    def flags(self) -> list[str]:
        """List the options as the command line has them."""
        return list(self._parser()[0]._option_string_actions)

    def _parser(self) -> tuple[argparse.ArgumentParser, dict[str, _Option]]:
        """Make the parser; return also its options by name, without those that print something."""
        kinds: list[tuple[str, type]] = [("options", _GeneralOptions)]
        for heading, kind in self.groups.items():
            kinds += [(heading, _PresetOptions), (heading, Recipe)] if kind is Recipe else [(heading, kind)]
        fields = [
            (heading, field, hint)
            for heading, kind in kinds
            for field, hint in _fields(kind)
            if field.name not in self.hidden
        ]
        required = "".join(f" {flag(field.name)} ..." for _, field, _ in fields if field.metadata["required"])
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
        options: dict[str, Any] = {}
        for heading, field, kind in fields:
            if heading != group.title:
                group = parser.add_argument_group(heading)
            names = [flag(field.name), *([flag(f"no_{field.name}")] if kind is bool else [])]
            options[field.name] = group.add_argument(*names, action=_Option, field=field, kind=kind)
        return parser, options


@dataclass(frozen=True)
class _Entry:
    """What a --config file says of one category: where, and the values of the category's own options."""

    file: str
    where: str
    values: Mapping[str, Any]

    def options(self, category: str, values: Mapping[str, Any]) -> CategoryOptions:
        """Make the category's options of its own values, and of those for all. Raises ConfigError."""
        every = {**values, **self.values}
        recipe, own = (
            {field.name: every[field.name] for field, _ in _fields(kind) if field.name in every}
            for kind in (Recipe, CategoryOptions)
        )
        try:
            return CategoryOptions(category, Recipe(**recipe), self.file, **own)
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {error}") from error


def run_job(job: Job, argv: Sequence[str]) -> NoReturn:
    """Run a job as this process, with the words after its name: exit with its code, and log an error as one line.

    Standard input and output accept bytes that are not UTF-8; the output escapes them. What is closed is not written.
    """
    stop_on_signals()
    for name in ("stdout", "stderr"):
        # As a scheduler may start a process.
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    # Errors in the options are logged before the format that the options choose is known.
    start_logging(job.name, "text")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = job(argv)
    except KeyboardInterrupt:
        number = stop_signal() or signal.SIGINT
        log.info(f"stopped by {number.name}: {HOW_TO_CONTINUE}")
        code = STOPPED + number
    except StpmError as error:
        log.critical("%s", error)
        code = exit_code_for(error)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        log.critical(last_line(error) + (f"; make room on that disk; {HOW_TO_CONTINUE}" if is_full else ""))
        code = SOME_FAILED if is_full else COULD_NOT_RUN
    sys.exit(code)


def _fields(kind: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """List the options of a dataclass, and the types of their values; one that may be None is given as a number."""
    hints = get_type_hints(kind)
    options = [field for field in dataclasses.fields(kind) if field.metadata]
    return [(field, float if hints[field.name] == float | None else hints[field.name]) for field in options]


def _read_values(options: Mapping[str, _Option], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Return the values that the environment, the command line and the files that they name give, by option."""
    variables = {name: f"STPM_{name.upper()}" for name in options}
    in_environment = [
        (name, os.environ[variable], f"the environment ({variable})")
        for name, variable in variables.items()
        if variable in os.environ
    ]
    values: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for name, text, where in (*in_environment, *kept):
        if name == "config":
            found = dict(_read_config(text, options))
            if "by_category" in values and "by_category" in found:
                raise ConfigError(f"--config {hide_urls(text)}: another file has options by category, too; join them")
            values |= found
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
    shown = hide_urls(path)
    try:
        loader = yaml.BaseLoader(Path(path).read_text("utf-8"))
        for key, node, where in _lines(loader.get_single_node(), shown):
            name = key.replace("-", "_")
            if name == "config":
                raise ConfigError(f"{where}: a file cannot name another one; give --config several times")
            if name not in options:
                raise _no_option(flag(name), map(flag, options), f"{where}: ")
            if name == "categories" and "preset" in options and isinstance(node, yaml.MappingNode):
                yield from _read_categories(loader, node, shown, options)
            else:
                yield name, options[name].parse(loader.construct_object(node, deep=True), where)
    except OSError as error:
        raise ConfigError(f"--config {shown} cannot be read: {error.strerror}; see --help") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {shown} is not UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        line = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = getattr(error, "problem", "it has a character that YAML does not allow")
        raise ConfigError(f"--config {shown}{line}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"--config {shown} is nested too deeply; give `option: value` lines") from None


def _read_categories(
    loader: yaml.BaseLoader, mapping: yaml.MappingNode, file: str, options: Mapping[str, _Option]
) -> Iterator[tuple[str, Any]]:
    """Yield the entries of categories that have options of their own, and if they leave out all others, their names."""
    shared = {field.name: options[field.name] for field in dataclasses.fields(Recipe) if field.name != "seed"}
    known = shared | {field.name: _Option([], field.name, field, kind) for field, kind in _fields(CategoryOptions)}
    entries: dict[str, _Entry] = {}
    only = False
    for category, node, where in _lines(mapping, file, kind="category "):
        if (category, node.value) == _NO_OTHERS:
            only = True
            continue
        if category in entries:
            raise ConfigError(f"{where}: category {category} is there twice; give all of its options in one place")
        own = {}
        for key, value, line in _lines(node, file, f", category {category}"):
            if (name := key.replace("-", "_")) not in known:
                raise _no_option(flag(name), map(flag, known), f"{line}: ")
            own[name] = known[name].parse(loader.construct_object(value, deep=True), line)
        entries[category] = _Entry(file, f"{where}, category {category}", own)
    if only and not entries:
        raise ConfigError(f'{file}: categories has "*": no alone, which leaves none; name those to fit')
    yield "by_category", entries
    if only:
        yield "categories", Names(entries)


def _lines(
    node: yaml.Node | None, file: str, place: str = "", kind: str = "--"
) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield the keys of a mapping, which are names of this kind, their values, and where each stands.

    Raises:
        ConfigError: if it is no mapping, a key is no text, or a value is null.
    """
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file}{place} has no lines `option: value`")
    for key, value in node.value:
        where = f"{file}, line {key.start_mark.line + 1}{place}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: an option's name is text")
        if any(map(_is_null, value.value if isinstance(value, yaml.SequenceNode) else [value])):
            raise ConfigError(f"{kind}{key.value} is null in {where}; give a value, or leave it out")
        yield str(key.value), value, where


def _finite(text: str) -> float:
    """Parse a finite number. Raises ValueError."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _shown(value: Any) -> Any:
    """Shorten what is too long for a message."""
    is_long = isinstance(value, str) and len(value) > _MAX_SHOWN
    return f"{value[:_MAX_SHOWN]}…" if is_long else value or "empty"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _YAML_NULLS


def _text(value: Any) -> str:
    """Return the value if it is text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _no_option(name: str, known: Iterable[str], where: str = "") -> ConfigError:
    nearest = difflib.get_close_matches(name.strip("-"), [each.strip("-") for each in known], n=1)
    suggestion = f"; did you mean --{nearest[0]}?" if nearest else ""
    return ConfigError(hide_urls(f"{where}there is no option {name}{suggestion}; see --help"))
