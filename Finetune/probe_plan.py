"""The plan of Finetune/probe.py: settings -> encoders, cases, probes, all checked before any feature is computed."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from common.cache.statistics import InputStatistics
from common.config import convert, did_you_mean, group, setting, shown
from common.data.datalist import Case
from common.data.sampler import mix
from common.errors import InputError, one_line
from Finetune.architectures import ENCODERS, EncoderSettings, ModelSettings, encoder_sizes, read_encoder
from Finetune.cases import class_of, development_and_test, few_labels, find_cases, split
from Finetune.evaluation.probes import PROBES
from Finetune.heads import Architecture
from Finetune.presets import Preset
from Finetune.settings import DataSettings

RANDOM = "random"


@dataclass(kw_only=True)
class ProbeSettings(DataSettings):
    """Settings of the probes."""

    out: Path = setting(help="folder for probe.json and probe.txt")
    inits: str = setting(RANDOM, "NAME=FILE[:FILE...][@KEY], separated by commas; random is always added")
    probes: str = setting(",".join(PROBES), "probes, separated by commas")
    label_counts: str = setting("all", "numbers of training cases, separated by commas; all: every training case")
    seeds: str = setting("0,1,2", "seeds, separated by commas")
    encoder: Literal["auto", *ENCODERS] = setting("auto", "auto: that of each checkpoint, the ViT without one")
    network: EncoderSettings = group(EncoderSettings, "Encoder")
    class_token: bool = setting(True, "keep the CLS token of the ViT, as in pretraining")
    learning_rates: str = setting("1e-3,3e-3,1e-2,3e-2,1e-1", "of linear and attentive, separated by commas")
    updates: int = setting(500, "updates of linear and attentive", least=1)
    batch_size: int = setting(8, "crops per update", least=1, most=65536)
    neighbours: int = setting(20, "neighbours of knn", least=1)
    crops_per_volume: int = setting(0, "random training crops besides those that cover the volume", least=0, most=1024)
    sw_batch_size: int = setting(4, "crops per forward pass of the encoder", least=1)
    workers: int = setting(0, "processes that fill the cache", least=0)
    amp: Literal["auto", "bf16", "fp16", "off"] = setting("auto", "autocast; auto: bf16 on CUDA, off on a CPU")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA if available")


@dataclass(frozen=True)
class Init:
    """An initialisation: checkpoints of one architecture, or () for random weights."""

    name: str
    files: tuple[Path, ...]
    key: str | None
    architecture: Architecture


@dataclass(frozen=True)
class ProbeCases:
    """The cases of a run. `subsets` are the names of the training cases by (number of labels, seed)."""

    training: tuple[Case, ...]
    development: tuple[Case, ...]
    test: tuple[Case, ...]
    subsets: dict[tuple[int, int], tuple[str, ...]]


@dataclass(frozen=True)
class ProbePlan:
    """What is done, checked before it starts. `baselines` are initialisation -> the random one of its architecture."""

    inits: tuple[Init, ...]
    baselines: dict[str, str]
    seeds: tuple[int, ...]
    probes: tuple[str, ...]
    rates: tuple[float, ...]
    cases: ProbeCases


def make_plan(config: ProbeSettings, preset: Preset) -> ProbePlan:
    """Return what is to be done. Raise InputError for what can be found wrong before any feature is computed."""
    probes = values(config.probes, str, "probes")
    for name in probes:
        if name not in PROBES:
            expected = f"{did_you_mean(name, PROBES)}expected {', '.join(PROBES)}"
            raise InputError(f"--probes {name}: unknown probe; {expected}")
    rates = values(config.learning_rates, float, "learning_rates")
    if min(rates) <= 0:
        raise InputError(f"--learning_rates {min(rates):g}: must be more than 0")
    seeds = values(config.seeds, int, "seeds")
    inits, baselines = with_random(list(pretrained_inits(config, preset)) or [random_init(config, preset)])
    for init in inits:
        check_init(init)
    return ProbePlan(inits, baselines, seeds, probes, rates, choose_cases(config, preset, seeds))


def values(text: str, kind: Any, name: str) -> tuple[Any, ...]:
    """Return the different values in `text`, which are separated by commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return tuple(dict.fromkeys(convert(words or [text], tuple[kind, ...], f"--{name}")))


def pretrained_inits(config: ProbeSettings, preset: Preset) -> Iterator[Init]:
    """Yield the initialisations from checkpoints."""
    names = [RANDOM]
    for item in values(config.inits, str, "inits"):
        if item == RANDOM:
            continue
        match = re.fullmatch(r"([\w.+-]+)=(.+?)(?:@(\w+))?", item)
        if not match:
            raise InputError(f"--inits: found '{item}', expected {RANDOM} or NAME=FILE[:FILE...][@KEY]")
        name, files, key = match.groups()
        if name in names:
            raise InputError(f"--inits: found the name '{name}' twice, or for a checkpoint the name {RANDOM}")
        names.append(name)
        paths = tuple(Path(file) for file in files.split(":"))
        if missing := [path for path in paths if not path.is_file()]:
            raise InputError(f"--inits: {name}: {missing[0]}: no such checkpoint")
        found = dict.fromkeys(architecture_for(config, preset, path, key) for path in paths)
        if len(found) > 1:
            raise InputError(f"--inits: {name}: {paths[0]} and the others hold encoders of different architectures")
        yield Init(name, paths, key, next(iter(found)))


def random_init(config: ProbeSettings, preset: Preset) -> Init:
    """Return random weights of the architecture that the settings ask for."""
    return Init(RANDOM, (), None, architecture_for(config, preset, None, None))


def with_random(inits: Sequence[Init]) -> tuple[tuple[Init, ...], dict[str, str]]:
    """Return random weights of each architecture, then the pretrained ones; and pretrained -> random.

    If architectures differ, random weights are called after the first checkpoint of their architecture.
    """
    first = {init.architecture: init for init in reversed(inits)}
    names = {a: RANDOM if len(first) == 1 else f"{RANDOM} ({init.name})" for a, init in first.items()}
    twins = [Init(names[a], (), None, a) for a in dict.fromkeys(init.architecture for init in inits)]
    loaded = [init for init in inits if init.files]
    return (*twins, *loaded), {init.name: names[init.architecture] for init in loaded}


def architecture_for(config: ProbeSettings, preset: Preset, path: Path | None, key: str | None) -> Architecture:
    """Return the architecture of an encoder without a head, whose `model` is a name in `ENCODERS`.

    Raises:
        InputError: the settings and the checkpoint `path` contradict each other, or it holds no encoder.
    """
    kind = kind_of(path, key) if config.encoder == "auto" else config.encoder
    settings = ModelSettings(**vars(config.network))
    sizes = encoder_sizes(ENCODERS[kind], settings, preset, path, key)
    roi = tuple(settings.roi or preset.roi)
    if any(size % patch for size, patch in zip(roi, sizes["patch_size"])):
        raise InputError(f"--roi {shown(roi)}: must be divisible by the patch size {shown(sizes['patch_size'])}")
    return Architecture(
        model=kind,
        in_chans=preset.channels,
        out_channels=preset.out_channels,
        roi=roi,
        feature_size=1,
        class_token=kind == "vit" and config.class_token,
        **sizes,
    )


def kind_of(path: Path | None, key: str | None) -> str:
    """Return the encoder that a checkpoint holds, the ViT without a checkpoint. InputError if it holds none."""
    if path is None:
        return "vit"
    errors = []
    for kind, encoder in ENCODERS.items():
        try:
            read_encoder(path, encoder, key)
            return kind
        except InputError as error:
            errors.append(error)
    raise errors[0]


def check_init(init: Init) -> None:
    """Raise InputError if an encoder cannot be built, or a checkpoint does not fit it."""
    for seed in range(max(1, len(init.files))):
        # the report is printed when the encoder is used
        with contextlib.redirect_stdout(None):
            build_encoder(init, seed, seed, None)


def choose_cases(config: ProbeSettings, preset: Preset, seeds: Sequence[int]) -> ProbeCases:
    """Return the cases of the fold. InputError if one cannot be used, or if there are too few."""
    training, held_out = split(find_cases(preset, config.data, config.data_root), preset, config.fold)
    for case in [*training, *held_out]:
        if case.problem:
            raise InputError(case.problem)
        if preset.task == "classification":
            class_of(preset, case.image)
    development, test = development_and_test(held_out)
    if not development:
        raise InputError(f"--fold {config.fold}: has 1 case, expected 2 or more: development and test cases")
    words = values(config.label_counts, Literal["all"] | int, "label_counts")
    counts = dict.fromkeys(len(training) if word == "all" else word for word in words)
    subsets = {
        (count, seed): tuple(case.name for case in few_labels(training, preset, count, seed=seed))
        for count in counts
        for seed in seeds
    }
    used = {name for names in subsets.values() for name in names}
    return ProbeCases(tuple(case for case in training if case.name in used), (*development,), (*test,), subsets)


def build_encoder(init: Init, number: int, seed: int, statistics: InputStatistics | None) -> nn.Module:
    """Return an encoder with the weights of file `number`, or random ones of a seed.

    Args:
        statistics: mean and standard deviation per channel of the volumes, for random weights (`standardize_input`).

    Raises:
        InputError: it cannot be built, or the file does not fit.
    """
    torch.manual_seed(mix(seed, 1))
    try:
        encoder = ENCODERS[init.architecture.model].as_pretrained(init.architecture)
        if init.files:
            encoder.load_pretrained_checkpoint(init.files[number], checkpoint_key=init.key)
        elif statistics:
            encoder.standardize_input(statistics.mean, statistics.std)
    except ValueError as error:
        raise InputError(one_line(error)) from None
    return encoder
