"""Settings as dataclasses: made from plain values (YAML, a checkpoint, words of a command line), and turned back.

A program's dataclass may be composed of smaller ones that stand beside what they configure:

    @dataclass
    class PretrainSettings(LoopSettings):
        method: Literal["mae", "mim"] = setting("mae", "the pretraining method")
        mim: MiMSettings = group(MiMSettings, "MiM", method="mim")

In a YAML file, in a checkpoint and on the command line all settings have flat names (`num_mid: 4`, `--num_mid 4`); in
the code they are `settings.mim.num_mid`. The command line itself is read by common/cli.py.
"""

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from common.errors import InputError, one_line
from common.files import naming_errors

T = TypeVar("T")
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
# limits of a YAML file after its aliases are resolved
MAX_DEPTH, MAX_VALUES = 50, 100_000


# ---------------------------------------------------------------- declaring settings


def setting(default: Any = dataclasses.MISSING, help: str = "", **bounds: float) -> Any:
    """Return a dataclass field with a line of help. Without `default` the setting is required.

    `bounds` are `least`, `above`, `most` and `below`: a number, or each of several, is >=, >, <=, < it. NaN and
    infinity are always refused. A dict or list as default is copied for every instance.
    """
    if unknown := bounds.keys() - BOUNDS.keys():
        raise TypeError(f"setting() has no bound {', '.join(unknown)}")
    metadata = {"help": help, **bounds}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type, title: str, **when: Any) -> Any:
    """Return a dataclass field that holds the settings of the dataclass `cls`, which keep their flat names.

    `title` is their heading in `--help`. `when` names the setting, and the value or tuple of values of it, for which
    the group is used: `group(MiMSettings, "MiM", method="mim")`. Without `when` the group is always used.
    """
    conditions = {name: value if isinstance(value, tuple) else (value,) for name, value in when.items()}
    return dataclasses.field(default_factory=cls, metadata={"group": title, "when": conditions})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a dataclass, of its own or of a group in it."""

    field: dataclasses.Field
    kind: Any
    title: str
    when: Mapping[str, tuple[Any, ...]]

    @property
    def required(self) -> bool:
        return self.field.default is self.field.default_factory is dataclasses.MISSING

    @property
    def default(self) -> Any:
        """The default value, dataclasses.MISSING where the setting is required."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()


@functools.cache
def settings_of(cls: type) -> Mapping[str, Setting]:
    """All settings of a dataclass by their flat names, those of its groups included.

    Raises:
        TypeError: two groups have a setting of the same name; a group is used for a value of a setting that does not
            exist or cannot have that value; or such a group has a required setting.
    """
    found: dict[str, Setting] = {}
    for name, entry in _walk(cls, "Settings", {}):
        if name in found:
            raise TypeError(f"{cls.__name__}: two settings are called {name} ({found[name].title}, {entry.title})")
        found[name] = entry
    for name, entry in found.items():
        for selector, values in entry.when.items():
            if selector not in found or not set(values) <= set(choices(found[selector].kind) or values):
                raise TypeError(f"{cls.__name__}: {name} is used for {selector} {values}, which does not exist")
        if entry.when and entry.required:
            raise TypeError(f"{cls.__name__}: {name} is not used by every run and needs a default")
    return types.MappingProxyType(found)


def _walk(cls: type, title: str, when: Mapping[str, Any]) -> Iterable[tuple[str, Setting]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            yield from _walk(hints[field.name], field.metadata["group"], {**when, **field.metadata["when"]})
        elif field.init:
            yield field.name, Setting(field, hints[field.name], title, when)


def choices(kind: Any) -> tuple[Any, ...]:
    """The values that a Literal, or one that may be none, allows; () for other types."""
    kinds = [kind, *typing.get_args(kind)]
    return next((typing.get_args(k) for k in kinds if typing.get_origin(k) is Literal), ())


# ---------------------------------------------------------------- from plain values


def from_dict(values: Any, cls: type[T], where: str = "") -> T:
    """Return a dataclass made from a mapping of flat names to values. `where` names the mapping in errors.

    Raises:
        InputError: a name is unknown (the nearest right one is given), a required one is missing, or a value has the
            wrong type or is out of bounds.
    """
    prefix = f"{where}: " if where else ""
    converted = convert_all(values, cls, where)
    if absent := missing(converted, cls):
        raise InputError(f"{prefix}missing setting(s) {', '.join(absent)}")
    return build(converted, cls)


def convert_all(values: Any, cls: type, where: str = "") -> dict[str, Any]:
    """Return the values of a mapping converted to the types of the settings of `cls`; it need not be complete.

    Raises:
        InputError: as `from_dict`, except for missing settings.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where or cls.__name__}: found {type(values).__name__}, expected a mapping of settings")
    prefix, known = f"{where}: " if where else "", settings_of(cls)
    for name in values:
        if name not in known:
            near = nearest(str(name), known)
            hint = f"did you mean '{near}'?" if near else f"expected one of {', '.join(known)}"
            raise InputError(f"{prefix}unknown setting '{name}'; {hint}")
    return {name: convert_setting(value, known[name], f"{prefix}{name}") for name, value in values.items()}


def convert_setting(value: Any, entry: Setting, where: str) -> Any:
    """Return one value converted to the type of its setting. InputError when that fails, or it is out of bounds."""
    converted = convert(value, entry.kind, where)
    check_bounds(converted, entry.field.metadata, f"{where} {shown(value)}")
    return converted


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, "" where none is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name that is most like `name`; "" where none is."""
    near = nearest(name, known)
    return f"did you mean '{near}'? " if near else ""


def missing(values: Mapping[str, Any], cls: type) -> list[str]:
    """Names of the required settings of `cls` that have no value."""
    return [name for name, entry in settings_of(cls).items() if entry.required and name not in values]


def build(values: Mapping[str, Any], cls: type[T]) -> T:
    """Return `cls`, with its groups, from converted values under flat names."""
    hints, own = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            own[field.name] = build(values, hints[field.name])
        elif field.name in values:
            own[field.name] = values[field.name]
    return cls(**own)


def check_bounds(value: Any, bounds: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless a number, or each of several, is finite and within the bounds of its setting. `where`
    is the setting with its value as given."""
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not math.isfinite(number):
            raise InputError(f"{where}: must be finite")
        for name, (holds, words) in BOUNDS.items():
            if name in bounds and not holds(number, bounds[name]):
                raise InputError(f"{where}: must be {words} {bounds[name]}")


# ---------------------------------------------------------------- one value


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return a value from YAML or the command line as the annotated type `kind`. `where` names it in errors.

    Raises:
        InputError: the value cannot be converted.
        TypeError: there is no conversion to `kind`.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return from_dict(value, kind, where)
    reader = _READERS.get(typing.get_origin(kind) or kind)
    if reader is None:
        raise TypeError(f"{where}: no conversion to {kind}")
    return reader(value, kind, where)


def _refuse(value: Any, expected: str, where: str) -> typing.NoReturn:
    found = repr(value)
    if isinstance(value, (list, tuple)):
        found = f"{len(value)} values {shown(value)}" if value else "nothing"
    raise InputError(f"{where}: found {found}, expected {expected}")


def _union(value: Any, kind: Any, where: str) -> Any:
    kinds = typing.get_args(kind)
    options = [option for option in kinds if option is not type(None)]
    if type(None) in kinds and str(value).lower() in ("none", "null"):
        return None
    for option in options[:-1]:
        try:
            return convert(value, option, where)
        except InputError:
            pass
    return convert(value, options[-1], where)


def _literal(value: Any, kind: Any, where: str) -> Any:
    allowed = typing.get_args(kind)
    # YAML reads a bare `off` as false
    word = "off" if value is False and "off" in allowed else value
    for option in allowed:
        if str(option) == str(word):
            return option
    _refuse(value, f"one of {', '.join(map(str, allowed))}", where)


def _sequence(value: Any, kind: Any, where: str) -> tuple[Any, ...] | list[Any]:
    container, kinds = typing.get_origin(kind), typing.get_args(kind)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if container is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    elif len(values) == 1:
        values = values * len(kinds)
    if len(values) != len(kinds):
        _refuse(values, f"{len(kinds)} (or 1 for all)", where)
    return container(convert(v, k, where) for v, k in zip(values, kinds))


def _dict(value: Any, kind: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        _refuse(value, "a mapping", where)
    of_key, of_value = typing.get_args(kind)
    return {convert(k, of_key, where): convert(v, of_value, f"{where}.{k}") for k, v in value.items()}


def _bool(value: Any, kind: Any, where: str) -> bool:
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        _refuse(value, "true or false", where)
    return words[str(value).lower()]


def _scalar(value: Any, kind: Any, where: str) -> Any:
    expected = {int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        _refuse(value, expected, where)
    try:
        converted = kind(str(value) if kind is Path else value)
    except (ValueError, OverflowError):
        _refuse(value, expected, where)
    if kind is int and isinstance(value, float) and value != converted:
        _refuse(value, expected, where)
    return converted


_READERS: dict[Any, Callable[[Any, Any, str], Any]] = {
    typing.Union: _union,
    types.UnionType: _union,
    Literal: _literal,
    tuple: _sequence,
    list: _sequence,
    dict: _dict,
    bool: _bool,
    **dict.fromkeys((int, float, str, Path), _scalar),
}


# ---------------------------------------------------------------- files and plain types


def load_yaml(path: str | Path) -> Any:
    """Return the plain content of a YAML file. InputError when it cannot be read or is not YAML."""
    try:
        with naming_errors(path, "cannot be read"):
            content = yaml.safe_load(Path(path).read_text())
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML ({one_line(error)})") from None
    _check_nesting(content, path)
    return content


def _check_nesting(content: Any, path: str | Path) -> None:
    """Raise InputError for nested values that refer to themselves, or to each other so often that they grow without
    end when they are printed or copied."""
    waiting, count = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise InputError(f"{path}: found more than {MAX_DEPTH} levels or {MAX_VALUES} values, expected settings")
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(item, depth + 1) for item in inner]


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, {} when it is empty. InputError as `load_yaml`, and for other content."""
    values = load_yaml(path)
    if not isinstance(values, (dict, types.NoneType)):
        raise InputError(f"{path}: found {type(values).__name__}, expected a mapping of settings")
    return values or {}


def read_yaml(path: str | Path, cls: type[T]) -> T:
    """Return the dataclass `cls` made from a YAML file. InputError as `load_yaml` and `from_dict`."""
    return from_dict(load_mapping(path), cls, str(path))


def to_dict(config: Any) -> Any:
    """Return plain types only (dict, list, str, int, float, bool, None), with the settings of groups under their flat
    names: what a checkpoint, a YAML or a JSON file may hold, and what `from_dict` reads."""
    if dataclasses.is_dataclass(config):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            value = to_dict(getattr(config, field.name))
            plain |= value if "group" in field.metadata else {field.name: value}
        return plain
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def shown(value: Any) -> str:
    """A value as it is given on the command line: `96 96 96`, `none`, `true`."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
