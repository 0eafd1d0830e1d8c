"""Command line of every program: flags from a settings dataclass, `--config FILE.yaml`, exit codes."""

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from common import signals
from common.config import convert, from_dict, load_yaml
from common.errors import InputError

T = TypeVar("T")


def run_program(main: Callable[[], Any]) -> int:
    """Run `main`; a bad input becomes one line on stderr and exit code 2, Ctrl-C becomes 130, SIGTERM and SIGUSR1
    become 75 (common/signals.py)."""
    signals.install_handlers()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except signals.Requeue as stop:
        if not stop.agreed:
            print("asked to stop; start the same command again to go on", file=sys.stderr)
        raise
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flags = [o for a in self._actions for o in a.option_strings]
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1) if word.startswith("--") else []
            if near and near[0] != word:
                message += f" (did you mean {near[0]}?)"
        raise InputError(message)


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """The dataclass `cls` from command-line flags; `--config FILE.yaml` is read first and flags win.

    `--help` shows every setting with the value this call would use, so a recipe's `--help` shows the recipe's values.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(cls)
    parser = _Parser(description=description or cls.__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; flags win over it")
    for field in dataclasses.fields(cls):
        _add_flag(parser, field, hints[field.name])
    wants_help = any(a in ("-h", "--help") for a in argv)
    given = vars(parser.parse_args([a for a in argv if a not in ("-h", "--help")]))
    config_file = given.pop("config")
    values = (load_yaml(config_file) or {}) if config_file else {}
    if not isinstance(values, dict):
        raise InputError(f"{config_file}: found {type(values).__name__}, needs a mapping of settings")
    values |= {key: value for key, value in given.items() if value is not _UNSET}
    if wants_help:
        print(_help_text(cls, values, parser.prog, description))
        raise SystemExit(0)
    return from_dict(values, cls, config_file or "settings")


_UNSET = object()


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    flag = f"--{field.name}"
    inner = [a for a in typing.get_args(kind) if a is not type(None)] if type(None) in typing.get_args(kind) else [kind]
    if inner == [bool]:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=_UNSET)
    elif any(typing.get_origin(k) in (tuple, list) for k in inner):
        parser.add_argument(flag, nargs="+", default=_UNSET)
    else:
        parser.add_argument(flag, default=_UNSET)


def _help_text(cls: type, values: dict[str, Any], prog: str, description: str | None) -> str:
    hints = typing.get_type_hints(cls)
    lines = [
        f"usage: {prog} [--config FILE.yaml] [--SETTING VALUE ...]",
        "",
        (description or cls.__doc__ or "").strip(),
        "",
    ]
    for field in dataclasses.fields(cls):
        if field.name in values:
            default = convert(values[field.name], hints[field.name], field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        shown = "required" if default is dataclasses.MISSING else f"default {_shown(default)}"
        lines.append(f"  --{field.name:<24} {field.metadata.get('help', '')} [{shown}]")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "()"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
