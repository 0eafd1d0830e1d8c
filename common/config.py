"""Settings: one dataclass per program makes its flags, reads its YAML, and is what the checkpoint stores.

Our choice (argparse + dataclass + YAML): no dependency, and a pasted `--roi 96 96 96` works.
"""

import argparse
import dataclasses
import difflib
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from common import signals

T = TypeVar("T")


class InputError(ValueError):
    """What the user gave cannot be used. The message: the file or setting, what was found, what is allowed."""


def setting(default: Any = dataclasses.MISSING, help: str = "", **kwargs: Any) -> Any:
    """A dataclass field with its help line. Without `default` it is required; mutable defaults go through a factory.

    `least` and `above` bound a number, or each of several: at least, more than.
    """
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help, **kwargs})
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def run_program(main: Callable[[], Any]) -> int:
    """Run `main`; a bad input becomes one line on stderr and exit code 2, Ctrl-C becomes 130, SIGTERM and SIGUSR1
    become 75 (common/signals.py)."""
    signals.listen()
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


def check_writable(folder: Path) -> None:
    """Make the folder where it is missing; InputError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------- values


def convert(value: Any, kind: Any, where: str) -> Any:
    """Check and convert one value (from YAML or a flag) to the annotated type `kind`; `where` names it in errors."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        word = value[0] if isinstance(value, list) and len(value) == 1 else value  # flags of several values give lists
        if word is None or (isinstance(word, str) and word.lower() in ("none", "null")):
            if type(None) in args:
                return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return convert(value, option, where)
            except InputError:
                if option is options[-1]:
                    raise
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where}: found {value!r}, allowed: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        variadic = len(args) == 2 and args[1] is Ellipsis
        if not variadic:
            if len(values) == 1:
                values = values * len(args)  # one number for all axes
            if len(values) != len(args):
                raise InputError(f"{where}: found {len(values)} values {values}, needs {len(args)} (or 1 for all)")
        return tuple(
            convert(v, args[0] if variadic else a, where) for v, a in zip(values, args if not variadic else values)
        )
    if origin is list:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return [convert(v, args[0], where) for v in values]
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: found {value!r}, needs a mapping")
        return {convert(k, args[0], where): convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(value, kind, where)
    if kind is Any:
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise InputError(f"{where}: found {value!r}, allowed: true, false")
    if kind is Path:
        return Path(value)
    if kind in (int, float, str):
        if isinstance(value, bool) or value is None or isinstance(value, (list, dict)):
            raise InputError(f"{where}: found {value!r}, needs {kind.__name__}")
        try:
            converted = kind(value)
        except ValueError:
            raise InputError(f"{where}: found {value!r}, needs {kind.__name__}") from None
        if kind is int and isinstance(value, float) and value != converted:
            raise InputError(f"{where}: found {value!r}, needs a whole number")
        return converted
    raise TypeError(f"{where}: no conversion to {kind}")


def from_dict(values: Any, cls: type[T], where: str = "") -> T:
    """A dataclass from a mapping. Unknown keys name themselves and the nearest right one; missing ones are listed."""
    if not isinstance(values, dict):
        raise InputError(f"{where or cls.__name__}: found {type(values).__name__}, needs a mapping of settings")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(fields)}"
            raise InputError(f"{where}: unknown setting '{key}'; {hint}")
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and n not in values
    ]
    if required:
        raise InputError(f"{where}: missing setting(s) {', '.join(required)}")
    prefix = f"{where}: " if where else ""
    converted = {key: convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    for key, value in converted.items():
        check_bounds(value, fields[key].metadata, f"{prefix}{key}")
    return cls(**converted)


def check_bounds(value: Any, bounds: Mapping[str, Any], where: str) -> None:
    """InputError unless a number, or each of several, keeps the `least` and `above` of its setting."""
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if not isinstance(number, (int, float)):
            continue
        if "least" in bounds and not number >= bounds["least"]:
            raise InputError(f"{where}: found {value}, needs at least {bounds['least']}")
        if "above" in bounds and not number > bounds["above"]:
            raise InputError(f"{where}: found {value}, needs more than {bounds['above']}")


def load_yaml(path: str | Path) -> Any:
    """The plain content of a YAML file; InputError when it is missing or not YAML."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def read_yaml(path: str | Path, cls: type[T]) -> T:
    """The dataclass `cls` (may be nested) from a YAML file, checked key by key."""
    return from_dict(load_yaml(path) or {}, cls, str(path))


def to_dict(config: Any) -> Any:
    """Plain types only (dict, list, str, int, float, bool, None): what a checkpoint or a JSON file may hold."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


# ---------------------------------------------------------------- flags


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
