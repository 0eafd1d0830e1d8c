"""The command line of a program: flags to its settings, `--help`, exit codes.

    python -m Pretrain.main_pretrain --config recipe.yaml --local_size 96 96 96 --no-norm_pix_loss --clip_grad none

A flag is the name of a setting, and the words after it are its value, read as the same value in YAML is
(common/config.py). Flags win over the file, later flags over earlier ones.

A script that passes its arguments on puts `--recipe NAME` between its own flags and theirs: what comes after it, also
a file, wins over what comes before it, and a run can be compared with the recipe (`recipe_of`).
"""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common import config, signals
from common.config import Setting, shown
from common.errors import InputError, one_line

T = TypeVar("T")
Settings = Mapping[str, Setting]
# flags that are no settings
RESERVED = ("config", "help", "recipe")


def run_program(main: Callable[[], Any]) -> int:
    """Run `main` and return the exit code of the program.

    An InputError, a path that the system does not accept, or memory that cannot be allocated becomes one line on
    stderr and 2, Ctrl-C becomes 130. SIGTERM and SIGUSR1 raise `signals.Requeue`, which ends the program with 75.
    """
    signals.install_handlers()
    # names of files may hold bytes that are not UTF-8; a stream that a test replaced may not have this method
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:
        # a path that no check expects, such as a name of more than 255 bytes
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {one_line(error.strerror)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch's allocator of host memory raises a RuntimeError
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: not enough memory for these settings or files ({one_line(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except signals.Requeue as stop:
        if not stop.agreed:
            print("asked to stop; start the same command again to go on", file=sys.stderr)
        raise
    return 0


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Return the dataclass `cls` made from the file that `--config` names and the flags, which win.

    `--help` prints the settings with the values that this call would use, `--help all` also those of groups that the
    call does not use, and both exit. A file may hold settings of unused groups: that of another run is accepted.

    Raises:
        InputError: a flag is unknown, is required and missing, has a wrong value, or belongs to an unused group; or
            the file cannot be used.
        TypeError: a setting is called `config`, `help` or `recipe`, or as `settings_of`.
    """
    known = config.settings_of(cls)
    of_recipe, words = (_read_flags(part, known) for part in _split(argv))
    wants_help, recipe = (of_recipe | words).get("help"), words.pop("recipe", None)
    if recipe is not None and len(recipe) != 1:
        raise InputError(f"--recipe: found {shown(recipe) or 'nothing'}, expected one name")
    recipe_file, recipe_flags = _convert(of_recipe, cls)
    of_file, flags = _convert(words, cls)
    values = recipe_file | recipe_flags | of_file | flags
    if wants_help is not None:
        print(_help_text(known, values, description or cls.__doc__ or "", wants_help == ["all"]))
        raise SystemExit(0)
    _check_used(recipe_flags | flags, known, values)
    if absent := config.missing(values, cls):
        raise InputError(f"missing setting(s) {', '.join(f'--{name}' for name in absent)}")
    return config.build(values, cls)


def recipe_of(cls: type, argv: Sequence[str] | None = None) -> tuple[str, dict[str, Any]] | None:
    """Return the name after `--recipe`, and the settings that the words before it give; None where there is none.

    The words are those of a call that `parse` has accepted.
    """
    of_recipe, words = _split(argv)
    # without a recipe the words may be those of another program, such as pytest
    if not words or words[0].partition("=")[0] != "--recipe":
        return None
    known = config.settings_of(cls)
    of_file, flags = _convert(_read_flags(of_recipe, known), cls)
    return _read_flags(words, known)["recipe"][0], of_file | flags


# ---------------------------------------------------------------- flags


def _split(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the words of the recipe, and those from `--recipe` on; without it all words are of the second kind."""
    words = list(sys.argv[1:] if argv is None else argv)
    place = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--recipe"), 0)
    return words[:place], words[place:]


def _convert(words: Mapping[str, list[str]], cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the file that `--config` names, and those of the flags."""
    known = config.settings_of(cls)
    flags = {name: _value(words[name], name, known[name]) for name in words if name not in RESERVED}
    return _read_file(words.get("config"), cls), flags


def _read_flags(argv: Sequence[str], known: Settings) -> dict[str, list[str]]:
    flags = _flags(known)
    given: dict[str, list[str]] = {}
    words = None
    for word in argv:
        flag, equals, value = ("--help" if word == "-h" else word).partition("=")
        if flag in flags:
            name, first = flags[flag]
            words = given[name] = [*first, value] if equals else [*first]
        elif flag.startswith("--"):
            near = config.nearest(flag[2:], [f[2:] for f in flags])
            raise InputError(f"{flag}: unknown setting; {f'did you mean --{near}?' if near else '--help lists all'}")
        elif words is None:
            raise InputError(f"found '{word}', expected a setting such as --config")
        else:
            words.append(word)
    return given


def _flags(known: Settings) -> dict[str, tuple[str, list[str]]]:
    """The setting that each flag gives, and the first words of its value: `--no-x` is `--x false`."""
    if taken := {*RESERVED} & set(known):
        raise TypeError(f"a program cannot have a setting called {' or '.join(taken)}")
    negations = {f"--no-{name}": (name, ["false"]) for name, entry in known.items() if entry.kind is bool}
    return {f"--{name}": (name, []) for name in (*RESERVED, *known)} | negations


def _value(words: list[str], name: str, entry: Setting) -> Any:
    if not words and entry.kind is bool:
        return True
    return config.convert_setting(words[0] if len(words) == 1 else words, entry, f"--{name}")


def _read_file(words: list[str] | None, cls: type) -> dict[str, Any]:
    if words is None:
        return {}
    if len(words) != 1:
        raise InputError(f"--config: found {shown(words) or 'nothing'}, expected a YAML file")
    return config.convert_all(config.load_mapping(words[0]), cls, words[0])


# ---------------------------------------------------------------- groups


def _current(name: str, known: Settings, values: Mapping[str, Any]) -> Any:
    return values.get(name, known[name].default)


def _used(entry: Setting, known: Settings, values: Mapping[str, Any]) -> bool:
    return all(_current(selector, known, values) in allowed for selector, allowed in entry.when.items())


def _check_used(flags: Mapping[str, Any], known: Settings, values: Mapping[str, Any]) -> None:
    for name in flags:
        if not _used(known[name], known, values):
            run = " ".join(f"--{selector} {shown(_current(selector, known, values))}" for selector in known[name].when)
            raise InputError(f"--{name}: is a setting of {_condition(known[name])}, this run has {run}")


def _condition(entry: Setting) -> str:
    return ", ".join(f"--{selector} {' or '.join(map(shown, allowed))}" for selector, allowed in entry.when.items())


# ---------------------------------------------------------------- help


def _help_text(known: Settings, values: Mapping[str, Any], description: str, everything: bool) -> str:
    groups: dict[str, list[str]] = {}
    hidden: dict[str, None] = {}
    for name, entry in known.items():
        heading = f"{entry.title} ({_condition(entry)})" if entry.when else entry.title
        if everything or _used(entry, known, values):
            groups.setdefault(heading, []).append(_help_line(name, entry, values))
        else:
            hidden[heading] = None
    lines = [f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml] [--SETTING VALUE ...]", "", description.strip()]
    for heading, rows in groups.items():
        lines += ["", f"{heading}:", *rows]
    if hidden:
        lines += ["", f"Not used by this call, shown by --help all: {'; '.join(hidden)}"]
    return "\n".join(lines)


def _help_line(name: str, entry: Setting, values: Mapping[str, Any]) -> str:
    metadata, allowed = entry.field.metadata, config.choices(entry.kind)
    notes = [f"one of {', '.join(map(str, allowed))}"] if allowed else []
    notes += [f"{words} {metadata[bound]}" for bound, (_, words) in config.BOUNDS.items() if bound in metadata]
    notes += [f"this call {_shown(values[name])}"] if name in values else []
    notes += ["required" if entry.required else f"default {_shown(entry.default)}"]
    return f"  --{name:<24} {metadata.get('help', '')} [{'; '.join(notes)}]"


def _shown(value: Any) -> str:
    return shown(value) or repr(value)
