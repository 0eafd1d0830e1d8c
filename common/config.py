"""Settings: one dataclass per program makes its flags, reads its YAML, and is what the checkpoint stores.

Our choice (argparse + dataclass + YAML): no dependency, and a pasted `--roi 96 96 96` works.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from common.errors import InputError

T = TypeVar("T")


def setting(default: Any = dataclasses.MISSING, help: str = "", **kwargs: Any) -> Any:
    """A dataclass field with its help line. Without `default` it is required; mutable defaults go through a factory.

    `least` and `above` bound a number, or each of several: at least, more than.
    """
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help, **kwargs})
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


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
