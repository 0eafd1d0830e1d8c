"""The settings of main_finetune that all runs of a sweep share, its budget of updates, and the grid that is tuned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from common.config import convert_all, from_dict, load_mapping, settings_of, shown, to_dict
from common.errors import InputError
from Finetune.presets import Preset
from Finetune.settings import CaseSettings, FinetuneSettings, StartSettings, check_settings

# A run has this many epochs of equally many updates, whatever the number of labels (our choice). They are the unit of
# validate_every, save_every and head_warmup_epochs.
EPOCHS = 20
# settings of main_finetune that the sweep sets
OWN = {"out_dir", "seed", "order_seed", "model", "epochs", "samples_per_epoch", "warmup_epochs"}
OWN |= {*settings_of(CaseSettings), *settings_of(StartSettings)}
Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What all runs of a sweep share.

    Args:
        settings: of main_finetune, by name, as plain values.
        updates: of a run.
        warmup: share of the updates in which the learning rate rises.
    """

    settings: Mapping[str, Any]
    updates: int
    warmup: float

    def __post_init__(self):
        if self.updates > EPOCHS and self.updates % EPOCHS:
            raise InputError(f"--updates {self.updates}: must be a multiple of {EPOCHS}, the epochs of a run, or less")

    @property
    def epochs(self) -> int:
        return min(self.updates, EPOCHS)

    def flags(self, candidate: Candidate, task: Literal["segmentation", "classification"]) -> list[str]:
        """Return the flags of main_finetune that set the budget and the settings of a candidate."""
        settings = {**self.settings, **candidate}
        batch = settings.get("batch_size", settings_of(FinetuneSettings)["batch_size"].default)
        chosen = {
            "epochs": self.epochs,
            "samples_per_epoch": batch * (self.updates // self.epochs),
            "warmup_epochs": self.warmup * self.epochs,
            **candidate,
        }
        if task == "classification" and not settings.get("validate_every"):
            # the last validation writes the scores
            chosen["validate_every"] = self.epochs
        elif "validate_every" not in settings and settings.get("select") != "best":
            # the label maps are scored afterwards
            chosen["validate_every"] = 0
        return [word for name, value in chosen.items() for word in (f"--{name}", *shown(value).split())]

    def content(self, candidate: Candidate) -> dict[str, Any]:
        """Return what identifies the settings of a run: runs with equal ones need not be repeated."""
        return {**self.settings, **candidate, "updates": self.updates, "warmup": self.warmup}

    def check(self, model: str, candidate: Candidate, preset: Preset) -> None:
        """Raise InputError if a head cannot be trained with these settings."""
        required = {"preset": preset.name, "data": ".", "out_dir": "."}
        check_settings(from_dict({**required, **self.settings, **candidate, "model": model}, FinetuneSettings), preset)


def read_recipe(path: Path | None, updates: int, warmup: float) -> Recipe:
    """Return the recipe with the settings in a YAML file.

    Raises:
        InputError: a setting is not of main_finetune, has a wrong value or is set by the sweep.
    """
    settings = _checked({} if path is None else load_mapping(path), str(path))
    return Recipe(settings, updates, warmup)


def _checked(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings of main_finetune as plain values of their types."""
    if taken := sorted(OWN & settings.keys()):
        raise InputError(f"{where}: found '{taken[0]}', which the sweep sets")
    return {name: to_dict(value) for name, value in convert_all(settings, FinetuneSettings, where).items()}


def candidates(words: Sequence[str], recipe: Recipe) -> tuple[Candidate, ...]:
    """Return the grid that `--tune lr=1e-4,1e-3 weight_decay=0,0.1` names; one empty candidate without words.

    A value of several words, as of roi, is written with spaces: `roi=32 32 32,48 48 48`.

    Raises:
        InputError: a word is no NAME=VALUE,..., is no setting of main_finetune, or has no effect.
    """
    grid: dict[str, list[Any]] = {}
    for word in (part.strip() for text in words for part in text.split(";") if part.strip()):
        name, equals, text = word.partition("=")
        values = [value.split() for value in text.split(",") if value.strip()]
        if not equals or not values:
            raise InputError(f"--tune {word}: expected NAME=VALUE,VALUE,...")
        if name in grid:
            raise InputError(f"--tune {word}: found {name} twice")
        plain = [_checked({name: v[0] if len(v) == 1 else v}, "--tune")[name] for v in values]
        grid[name] = list({shown(value): value for value in plain}.values())
    if "blr" in grid and (recipe.settings.get("lr") is not None or "lr" in grid):
        raise InputError("--tune blr: has no effect, because lr is given")
    return tuple(dict(zip(grid, values)) for values in product(*grid.values()))


def candidate_text(candidate: Candidate) -> str:
    """Return a candidate as text: `lr 0.001, weight_decay 0.1`; "" for the empty one."""
    return ", ".join(f"{name} {shown(value)}" for name, value in candidate.items())
