"""A job's command line, YAML file and environment, all typed by the same frozen dataclasses.

Precedence: command line (where a file named by `--config` counts as the options in it, and later ones win),
environment (`STPM_<NAME>`), preset, default.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_loader
from jsonargparse.typing import register_type

from stpm import storage
from stpm.console import SOME_FAILED, STOPPED, USAGE, JsonLines, Say, Stopped, say, stop_on_signals
from stpm.errors import ConfigError, CutOffError, StpmError
from stpm.options import Integers, Names, Size
from stpm.recipe import PRESETS, Preset, Recipe

_PRESET_HELP = (
    "where the recipe starts from; `default`: a student (sgd 0.4 with a cosine, batch 8, 5 epochs) and a memory of "
    "normal features, size from the images; `paper`: the student alone, sgd 0.4, batch 32, 100 epochs; "
    "`notebook`: adam 4e-4, batch 4, 20 epochs, pixels from 0 to 1. Defaults are shown for the preset that is chosen"
)
_LOG_HELP = "how lines are said: as text, or each as a JSON object with time, run, job, category and message"
# Options that print something and exit: only once the preset has set the defaults.
_SHOWING = ("--print-config", "--help", "-h")


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


register_type(Integers, serializer=list, deserializer=lambda v: Integers(int(i) for i in _items(v)))
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
        raise ConfigError(f"{' '.join(message.split())}; see --help") from ex


@dataclasses.dataclass(frozen=True)
class Job:
    """A program: its options, as dataclasses, and the function that takes one of each and a `say`.

    A job with a Recipe among its options has `--preset`, which sets the recipe's defaults.

    Args:
        prog: its file name.
        description: what it does.
        kinds: the option dataclasses, fields unique across them.
        run: takes an instance of each kind and a function that prints a line; returns the exit code.
        hidden: fields that are not the user's to set.
        defaults: from a first parse to the defaults that other options' values call for.
    """

    prog: str
    description: str | None
    kinds: tuple[type, ...]
    run: Callable[..., int]
    hidden: tuple[str, ...] = ()
    defaults: Callable[[Namespace], Mapping[str, Any]] = lambda values: {}

    def __call__(self, argv: Sequence[str]) -> int:
        """Parse, make the dataclasses, run; returns the exit code. Raises StpmError."""
        *options, tell = self.parse(argv)
        return self.run(*options, tell)

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """One instance per kind, and what the job says its lines with.

        Raises:
            ConfigError: if an option is unknown, or a value cannot be.
        """
        if foreign := [word for word in argv if word != storage.as_utf8(word)]:
            raise ConfigError(f"{storage.as_utf8(foreign[0])}: a name that is not UTF-8; rename it, or name its folder")
        parser = self.parser()
        argv = _joined(argv, self._lists())
        values = parser.parse_args([word for word in argv if not word.startswith(_SHOWING)])
        defaults = dataclasses.asdict(PRESETS[values.preset]) if "preset" in values else {}
        defaults |= self.defaults(values)
        parser.set_defaults({name: value for name, value in defaults.items() if name not in self.hidden})
        values = parser.parse_args(list(argv))
        tell: Say = JsonLines(self.prog.removesuffix(".py")) if values.log == "json" else say
        return [*(_made_from(kind, values) for kind in self.kinds), tell]

    def _lists(self) -> list[str]:
        """The options that take several values."""
        hints = [(name, hint) for kind in self.kinds for name, hint in get_type_hints(kind).items()]
        return [f"--{name.replace('_', '-')}" for name, hint in hints if hint in (Integers, Names)]

    def parser(self) -> ArgumentParser:
        parser = _Parser(
            prog=self.prog,
            description=self.description,
            env_prefix="STPM",
            default_env=True,
            allow_abbrev=False,
            print_config="--print-config",
        )
        parser.add_argument("--config", action="config", help="YAML file that sets any of these options")
        parser.add_argument("--log", type=Literal["text", "json"], default="text", help=_LOG_HELP)
        if Recipe in self.kinds:
            parser.add_argument("--preset", type=Preset, default="default", help=_PRESET_HELP)
        for kind in self.kinds:
            hints = get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if field.name not in self.hidden:
                    _add_option(parser, field, hints[field.name])
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


def _add_option(parser: ArgumentParser, field: dataclasses.Field[Any], kind: Any) -> None:
    name = field.name.replace("_", "-")
    text = field.metadata["help"].replace("%", "%%")
    if kind is bool:
        yes_no = ActionYesNo(yes_prefix="", no_prefix="no-")
        parser.add_argument(f"--{name}", action=yes_no, default=field.default, help=text)
    else:
        parser.add_argument(f"--{name}", type=kind, default=field.default, help=text)


def _made_from(kind: type, values: Namespace) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in vars(values).items() if name in names}
    for name, value in chosen.items():
        if value is None:
            raise ConfigError(f"{name.replace('_', '-')} is null; give a value, or leave it out")
    return kind(**chosen)
