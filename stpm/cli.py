"""A job's command line, YAML file and environment, all typed by the same frozen dataclasses.

Precedence: command line (where a file named by `--config` counts as the options in it, and later ones win),
environment (`STPM_<NAME>`), preset, default.

What takes seconds to import is imported once the options are known to be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_loader
from jsonargparse.typing import register_type

from stpm import __version__
from stpm.console import SOME_FAILED, STOPPED, USAGE, LogFormat, Stopped, start_logging, stop_on_signals
from stpm.errors import ConfigError, CutOffError, StpmError
from stpm.method.recipe import PRESETS, Preset, Recipe
from stpm.options import Integers, Names, Size

log = logging.getLogger(__name__)

_PRESET_HELP = (
    "where the recipe starts from; `default`: a student (sgd 0.4 with a cosine, batch 8, 5 epochs) and a memory of "
    "normal features, size from the images; `paper`: the student alone, sgd 0.4, batch 32, 100 epochs; "
    "`notebook`: adam 4e-4, batch 4, 20 epochs, pixels from 0 to 1. "
    "The defaults shown are those of the preset chosen (default: default)"
)
_LOG_HELP = "as text, or each line as a JSON object with time, run, job, category and message (default: text)"
_EPILOG = (
    "Each option can also be set in a YAML file (--config) or in the environment (STPM_EPOCHS=20 for --epochs 20);\n"
    "the command line wins over the environment, and that over the preset and the defaults."
)
# What a value looks like; a choice is shown as what there is to choose from.
_METAVARS = {
    int: "INTEGER",
    float: "NUMBER",
    str: "TEXT",
    Integers: "INTEGER,INTEGER,...",
    Names: "TEXT,TEXT,...",
    Size: "HEIGHTxWIDTH",
}
# Options that print something and exit: only once the preset has set the defaults.
_SHOWING = ("--print-config", "--help", "-h")


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _integers(value: Any) -> Integers:
    try:
        return Integers(int(item) for item in _items(value))
    except ValueError as error:
        raise ValueError(f"{value!r} is not INTEGER,INTEGER,...") from error


register_type(Integers, serializer=list, deserializer=_integers)
register_type(Names, serializer=list, deserializer=lambda v: Names(str(i) for i in _items(v)))
register_type(Size, serializer=str, deserializer=lambda v: Size(str(v)))


class _Yaml(yaml.SafeLoader):
    """YAML whose integers are decimal and whose dates are text: YAML 1.1 would read the size `0x140` as 320."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("int", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))
set_loader("yaml", lambda text: yaml.load(text, _Yaml), exceptions=(yaml.YAMLError,))  # noqa: S506


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise it as a ConfigError, in the user's words where they are known."""
        text = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: --([^\s=]+)|Option '(\w+)' is not accepted", text):
            text = self._unknown(unknown[1] or unknown[2].replace("_", "-"))
        elif wrong := re.match(r'Parser key "(\w+)": (?:Not of type \w+: )?(.*)', text):
            action = next(action for action in self._actions if action.dest == wrong[1])
            reason, _, value = wrong[2].partition(" Got value: ")
            name = wrong[1].replace("_", "-")
            text = f"{name} is {value}; give {action.metavar}" if value else f"{name}: {reason}"
        raise ConfigError(f"{text}; see --help") from ex

    def _unknown(self, name: str) -> str:
        known = [flag.lstrip("-") for flag in self._option_string_actions]
        nearest = difflib.get_close_matches(name, known, n=1)
        return f"there is no option --{name}" + (f"; did you mean --{nearest[0]}?" if nearest else "")


@dataclasses.dataclass(frozen=True)
class Job:
    """A program: its options, as dataclasses, and the function that takes one of each.

    A job with a Recipe among its options has `--preset`, which sets the recipe's defaults.

    Args:
        prog: its file name.
        description: what it does.
        groups: the option dataclasses by their headings in the help; fields are unique across them.
        run: name of the function, as `package.module:function`: only what runs is imported. It takes an instance of
            each dataclass, and returns the exit code.
        example: a command line.
        hidden: fields that are not the user's to set.
        defaults: from a first parse to the defaults that other options' values call for.
    """

    prog: str
    description: str | None
    groups: Mapping[str, type]
    run: str
    example: str
    hidden: tuple[str, ...] = ()
    defaults: Callable[[Namespace], Mapping[str, Any]] = lambda values: {}

    def __call__(self, argv: Sequence[str]) -> int:
        """Parse, make the dataclasses, run; returns the exit code. Raises StpmError."""
        *options, log_format = self.parse(argv)
        start_logging(self.prog.removesuffix(".py"), log_format)
        log.info("%s of stpm %s starts", self.prog, __version__)
        code: int = resolve_name(self.run)(*options)
        return code

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """Make one instance per group, and the log's format.

        Raises:
            ConfigError: if an option is unknown, or a value cannot be.
        """
        for word in argv:
            _check_utf8(word)
        argv = _joined(argv, self._lists())
        values = self.parser({}).parse_args([word for word in argv if not word.startswith(_SHOWING)])
        defaults = dataclasses.asdict(PRESETS[values.preset]) if "preset" in values else {}
        values = self.parser(defaults | dict(self.defaults(values))).parse_args(argv)
        return [*(_made_from(kind, values) for kind in self.groups.values()), values.log]

    def _lists(self) -> list[str]:
        """The options that take several values."""
        hints = [(name, hint) for kind in self.groups.values() for name, hint in get_type_hints(kind).items()]
        return [f"--{name.replace('_', '-')}" for name, hint in hints if hint in (Integers, Names)]

    def parser(self, defaults: Mapping[str, Any]) -> ArgumentParser:
        """The parser, with these defaults by field name instead of the dataclasses'."""
        fields = [field for kind in self.groups.values() for field in dataclasses.fields(kind)]
        required = "".join(f" --{field.name} ..." for field in fields if field.metadata["required"])
        parser = _Parser(
            prog=self.prog,
            usage=f"python jobs/{self.prog}{required} [options]",
            description=self.description,
            epilog=f"example:\n  {self.example}\n\n{_EPILOG}",
            formatter_class=RawDescriptionHelpFormatter,
            env_prefix="STPM",
            default_env=True,
            allow_abbrev=False,
            print_config="--print-config",
        )
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


def run_job(job: Job) -> NoReturn:
    """Run a job as a process: its exit code, and errors as one line on standard error.

    Bytes that are no UTF-8 come in, and go out escaped, instead of ending it.
    """
    stop_on_signals()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        code = job(sys.argv[1:])
    except Stopped as stopped:
        print(f"stopped by {stopped}: what was done is kept; run the same command again to go on", flush=True)
        code = STOPPED + stopped.number
    except StpmError as error:
        print(f"error: {error}", file=sys.stderr)
        code = SOME_FAILED if isinstance(error, CutOffError) else USAGE
    except OSError as error:
        print(f"error: {_in_a_line(error)}", file=sys.stderr)
        code = USAGE
    sys.exit(code)


def _check_utf8(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError as error:
        from stpm.storage import as_utf8

        raise ConfigError(f"{as_utf8(word)}: a name that is not UTF-8; rename it, or name its folder") from error


def _in_a_line(error: OSError) -> str:
    """What a disk or a store says, the last line where Ray puts a task's trace before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _joined(argv: Sequence[str], lists: Sequence[str]) -> list[str]:
    """`--require a --require b` as `--require a,b`: given twice, the parser would take the last alone."""
    words = list(argv)
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name in lists and (equals or words):
            values.setdefault(name, []).append(value if equals else words.pop(0))
            # In the place of the last one: a file named by --config after it wins.
            rest = [word for word in rest if not word.startswith(f"{name}=")]
            rest.append(f"{name}={','.join(values[name])}")
        else:
            rest.append(f"{name}{equals}{value}")
    return rest


def _add_option(group: Any, field: dataclasses.Field[Any], kind: Any, default: Any) -> None:
    name = f"--{field.name.replace('_', '-')}"
    shown = "required" if field.metadata["required"] else _shown(default)
    text = f"{field.metadata['help']}{f' ({shown})' if shown else ''}".replace("%", "%%")
    if kind is bool:
        group.add_argument(name, action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=default, help=text)
    else:
        metavar = _METAVARS.get(kind) or f"{{{','.join(get_args(kind))}}}"
        group.add_argument(name, type=kind, default=default, help=text, metavar=metavar)


def _shown(default: Any) -> str:
    """A default in words; nothing where it is empty, which the option's own text explains."""
    if isinstance(default, bool):
        return f"default: {'yes' if default else 'no'}"
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).removesuffix(".0")
    return f"default: {text}" if text else ""


def _made_from(kind: type, values: Namespace) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in vars(values).items() if name in names}
    for name, value in chosen.items():
        if value is None:
            raise ConfigError(f"{name.replace('_', '-')} is null; give a value, or leave it out")
    return kind(**chosen)
