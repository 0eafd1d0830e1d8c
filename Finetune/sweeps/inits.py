"""Initialisations of a sweep: names for checkpoints, and the heads that they fit."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import from_dict, settings_of
from common.errors import InputError
from common.files import file_sha256
from common.runlog import print_main
from Finetune.architectures import Architecture, ModelSettings, resolve
from Finetune.presets import Preset
from Finetune.pretrained import read_checkpoint

SCRATCH = "scratch"


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained file, and the key of its weights (None: the usual ones)."""

    path: Path
    key: str | None = None

    @property
    def flags(self) -> list[str]:
        return ["--init", str(self.path.resolve()), *(["--checkpoint_key", self.key] if self.key else [])]

    @property
    def content(self) -> list[str]:
        """What identifies the weights."""
        return [_sha256(self.path), *([self.key] if self.key else [])]


@functools.cache
def _sha256(path: Path) -> str:
    return file_sha256(path)


# name -> its checkpoints, one per pretraining seed; () for scratch
Inits = dict[str, tuple[Checkpoint, ...]]


@dataclass(frozen=True)
class Start:
    """How one run of an initialisation starts: flags of main_finetune, and what identifies its content."""

    flags: tuple[str, ...]
    content: tuple[str, ...]


# ---------------------------------------------------------------- names and files


def read_inits(text: str) -> Inits:
    """Return the initialisations in `scratch,mae=a.pth:b.pth,glmae=c.pth@teacher,run/d.pth`.

    Each is scratch, FILE or NAME=FILE[:FILE...], the files of several pretraining seeds. FILE@KEY chooses the weights
    as `--checkpoint_key` does.

    Raises:
        InputError: a file does not exist or is no checkpoint, or two have one name.
    """
    inits: Inits = {}
    for word in (word.strip() for word in text.split(",")):
        name, checkpoints = (SCRATCH, ()) if word == SCRATCH else _read_init(word)
        if name in inits:
            raise InputError(f"--inits: found two that are called {name}, expected different names, folders or files")
        inits[name] = checkpoints
    return inits


def _read_init(word: str) -> tuple[str, tuple[Checkpoint, ...]]:
    name, equals, files = word.partition("=")
    if Path(word).is_file() or not equals:
        checkpoint = _read_checkpoint(word)
        return short_name(checkpoint.path) + (f"-{checkpoint.key}" if checkpoint.key else ""), (checkpoint,)
    if not re.fullmatch(r"[\w.+-]+", name) or name == SCRATCH:
        raise InputError(f"--inits: found the name '{name}', expected letters, digits and ._+- and not scratch")
    return name, tuple(map(_read_checkpoint, [files] if Path(files).is_file() else files.split(":")))


def _read_checkpoint(word: str) -> Checkpoint:
    path, at, key = (word, "", "") if Path(word).is_file() else word.rpartition("@")
    if not Path(path).is_file() or (at and not key):
        raise InputError(f"--inits: found '{word}', expected scratch or an existing checkpoint, FILE or FILE@KEY")
    try:
        read_checkpoint(path, key or None)
    except ValueError as error:
        raise InputError(f"--inits: {error}") from None
    return Checkpoint(Path(path), key or None)


def short_name(path: Path) -> str:
    """Return a name for folders and tables: run/checkpoint-last.pth -> run-checkpoint-last."""
    return f"{path.resolve().parent.name}-{path.stem}"


# ---------------------------------------------------------------- heads that fit


def starts(
    models: Sequence[str], inits: Inits, settings: Mapping[str, Any], preset: Preset
) -> dict[tuple[str, str], tuple[Start, ...]]:
    """Return (head, name of the initialisation) -> how its runs start, one per pretraining seed.

    A head starts from the checkpoints whose encoder fits it, and from scratch as the twin of the first of them: the
    same architecture, random weights. A head without an encoder starts from scratch only. A line is printed for each
    pair that is left out.

    Args:
        settings: of main_finetune.

    Raises:
        InputError: a head or an initialisation has no run, or the files of a name differ in architecture.
    """
    found: dict[tuple[str, str], tuple[Start, ...]] = {}
    reasons: dict[tuple[str, str], InputError] = {}
    for model in models:
        network = _network(settings, model)
        misfits = {name: _misfit(network, name, checkpoints, preset) for name, checkpoints in inits.items()}
        for name, checkpoints in inits.items():
            if misfits[name]:
                reasons[model, name] = misfits[name]
            elif name == SCRATCH:
                fitting = (inits[other][0] for other in inits if other != SCRATCH and not misfits[other])
                found[model, name] = (_from_scratch(network, next(fitting, None), preset),)
            else:
                found[model, name] = tuple(Start(tuple(c.flags), tuple(c.content)) for c in checkpoints)
    for position, names, flag in ((0, models, "--models"), (1, inits, "--inits")):
        for name in names:
            if name not in {pair[position] for pair in found}:
                raise InputError(f"{flag} {name}: {next(e for pair, e in reasons.items() if pair[position] == name)}")
    for (model, name), reason in reasons.items():
        print_main(f"left out: {model} from {name} ({reason})")
    return found


def _network(settings: Mapping[str, Any], model: str) -> ModelSettings:
    own = {name: value for name, value in settings.items() if name in settings_of(ModelSettings)}
    return from_dict({**own, "model": model}, ModelSettings)


def _misfit(network: ModelSettings, name: str, checkpoints: Sequence[Checkpoint], preset: Preset) -> InputError | None:
    """Return why the checkpoints do not fit a head, None if they do."""
    found: list[Architecture] = []
    for checkpoint in checkpoints:
        try:
            found.append(resolve(network, preset, checkpoint.path, checkpoint.key))
        except InputError as error:
            return error
    if any(architecture != found[0] for architecture in found):
        raise InputError(f"--inits {name}: found files of different architectures, expected those of one method")
    return None


def _from_scratch(network: ModelSettings, twin: Checkpoint | None, preset: Preset) -> Start:
    """Return the start from random weights, as the twin of a checkpoint if there is one."""
    if twin:
        return Start((*twin.flags, "--scratch_twin"), ("--scratch_twin", *twin.content))
    resolve(network, preset, None)
    return Start((), ())
