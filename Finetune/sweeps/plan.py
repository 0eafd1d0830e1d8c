"""From the settings of a sweep to its groups of runs. Everything that can be wrong is found here, before the first run.

A group is a head, an initialisation and a number of labels: first one run per candidate of --tune with the first seed,
then the chosen candidate with the other seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from common.config import convert, setting, to_dict
from common.data.datalist import Case
from common.errors import InputError
from common.files import digest
from Finetune.architectures import model_for
from Finetune.cases import development_and_test, few_labels, find_cases, split
from Finetune.presets import Preset, load_preset
from Finetune.settings import DataSettings
from Finetune.sweeps.inits import Start, read_inits, starts
from Finetune.sweeps.recipe import Candidate, Recipe, candidate_text, candidates, read_recipe

Part = Literal["labels", "weights", "order"]
SEED_FLAGS = {"labels": "--label_seed", "weights": "--seed", "order": "--order_seed"}


@dataclass(kw_only=True)
class SweepSettings(DataSettings):
    """Settings of a sweep."""

    out: Path = setting(help="folder for runs/, sweep.json, sweep.txt, sweep.png")
    updates: int = setting(help="updates of every run, whatever its number of labels", least=1, most=10**9)
    warmup: float = setting(0.1, "share of the updates in which the learning rate rises", least=0, most=0.5)
    models: str = setting("unetr", "heads, separated by commas, as --model of main_finetune")
    inits: str = setting(
        "scratch",
        "separated by commas: scratch, FILE, or NAME=FILE:FILE:... with a file per pretraining seed; FILE@KEY",
    )
    label_counts: str = setting("all", "numbers of training cases, separated by commas; all: every training case")
    seeds: str = setting("0", "seeds, separated by commas; the runs of a group take pretraining files in turn")
    vary: str = setting(
        "labels,weights,order", "what changes with the seed: the training cases, weights, order of data"
    )
    settings: Path | None = setting(None, "YAML with settings of main_finetune for all runs")
    tune: tuple[str, ...] = setting(
        (), "grid that every group chooses from on development cases: lr=1e-4,1e-3 weight_decay=0,0.1"
    )
    development: float | None = setting(
        None, "share of the held-out cases that is for --tune; none: 0.5 with --tune, else 0", least=0, below=1
    )
    jobs: int = setting(1, "runs at once, dealt over the CUDA devices or sharing the cores", least=1, most=1024)
    slurm: bool = setting(False, "write OUT/array.sbatch instead of running")
    slurm_options: str = setting("--gpus=1 --cpus-per-task=8 --time=24:00:00", "options of the array's tasks")
    only: int | None = setting(None, "number of the only group of runs to do, as in a task of the array", least=0)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep. `flags` are those of main_finetune that differ between runs."""

    title: str
    flags: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Group:
    """The runs of one head, initialisation and number of labels.

    Args:
        pretraining_seeds: number of checkpoints of the initialisation.
        runs: (number of a candidate, seed) -> run. Those of the first seed choose the candidate.
    """

    model: str
    init: str
    count: int
    pretraining_seeds: int
    runs: Mapping[tuple[int, int], SweepRun]

    @property
    def title(self) -> str:
        return f"{self.model} {self.init}, {self.count} labels"


@dataclass(frozen=True)
class Plan:
    """A sweep. `development` and `test` are the held-out cases: names that choose, and names that are reported."""

    preset: Preset
    recipe: Recipe
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    held_out: tuple[Case, ...]
    development: tuple[str, ...]
    test: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def number_of_runs(self) -> int:
        return len(self.groups) * (len(self.candidates) + len(self.seeds) - 1)


def make_plan(config: SweepSettings) -> Plan:
    """Return the plan of a sweep. Raise InputError for what can be found wrong before the first run starts."""
    preset, recipe = load_preset(config.preset), read_recipe(config.settings, config.updates, config.warmup)
    grid, seeds = candidates(config.tune, recipe), tuple(dict.fromkeys(_values(config.seeds, int, "seeds")))
    models = [model_for(model, preset) for model in dict.fromkeys(_values(config.models, str, "models"))]
    for model, candidate in product(models, grid):
        recipe.check(model, candidate, preset)
    training, held_out = split(find_cases(preset, config.data, config.data_root), preset, config.fold)
    for case in [*training, *held_out]:
        if case.problem:
            raise InputError(case.problem)
    development, test = _parts(config, held_out, tuned=len(grid) > 1)
    counts = _counts(config, preset, training)
    vary = set(_values(config.vary, Part, "vary"))
    inits = read_inits(config.inits)
    found = starts(models, inits, recipe.settings, preset)
    cases = [[case.name for case in part] for part in (training, held_out)]
    shared = [to_dict(preset), config.fold, cases]
    groups = []
    for ((model, init), of_init), count in product(found.items(), counts):
        runs = {}
        for (number, candidate), (position, seed) in product(enumerate(grid), enumerate(seeds)):
            start = of_init[position % len(of_init)]
            parts = {part: seed if part in vary else seeds[0] for part in SEED_FLAGS}
            key = digest([json.dumps([*shared, recipe.content(candidate), model, start.content, count, parts])])[:8]
            title = ", ".join(filter(None, (f"{model} {init}, {count} labels, seed {seed}", candidate_text(candidate))))
            folder = config.out / "runs" / f"{model}-{init}-{count}-seed{seed}-{key}"
            flags = _flags(model, start, count, parts) + recipe.flags(candidate, preset.task)
            runs[number, seed] = SweepRun(title, tuple(flags), folder)
        groups.append(Group(model, init, count, len(inits[init]), runs))
    return Plan(preset, recipe, grid, seeds, tuple(held_out), development, test, tuple(groups))


def _flags(model: str, start: Start, count: int, seeds: Mapping[str, int]) -> list[str]:
    words = ["--model", model, *start.flags, "--label_count", str(count)]
    return words + [word for part, flag in SEED_FLAGS.items() for word in (flag, str(seeds[part]))]


def _parts(config: SweepSettings, held_out: Sequence[Case], tuned: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the development and of the test cases."""
    share = config.development
    if share is None:
        share = 0.5 if tuned else 0.0
    development, test = (tuple(case.name for case in part) for part in development_and_test(held_out, share))
    if tuned and not development:
        found = f"found {len(held_out)} held-out case(s) and --development {share:g}"
        raise InputError(f"--tune: {found}, expected two cases or more and a share above 0")
    return development, test


def _counts(config: SweepSettings, preset: Preset, training: Sequence[Case]) -> list[int]:
    """Return the numbers of training cases without duplicates: "all" may be a number that is also given."""
    words = _values(config.label_counts, Literal["all"] | int, "label_counts")
    counts = list(dict.fromkeys(len(training) if word == "all" else word for word in words))
    for count in counts:
        few_labels(training, preset, count)
    return counts


def _values(text: str, kind: Any, name: str) -> list[Any]:
    """Return the values in `text`, which are separated by commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return list(convert(words or [text], tuple[kind, ...], f"--{name}"))
