"""Numeric settings with values that do not belong there."""

import random
import typing
from pathlib import Path
from typing import Any

import yaml

import generate_cache_files
from common.config import settings_of
from Finetune import evaluate, predict, sweep
from Finetune.settings import FinetuneSettings
from Pretrain.build import settings_class
from tests.reliability.fuzz_inputs.bench import PRETRAIN, Bench, Words, finetune_words, pretrain_words


def is_number(kind: Any) -> bool:
    return kind in (int, float) or any(is_number(part) for part in typing.get_args(kind) if not isinstance(part, str))


CLASSES = {
    "pretrain": settings_class(),
    "finetune": FinetuneSettings,
    "predict": predict.PredictSettings,
    "evaluate": evaluate.EvaluateSettings,
    "sweep": sweep.SweepSettings,
    "cache": generate_cache_files.CacheSettings,
}
NUMERIC = [
    (program, name) for program, cls in CLASSES.items() for name, s in settings_of(cls).items() if is_number(s.kind)
]
# values of which each setting gets one after another, starting at a random one
SETTING_VALUES = [
    "0",
    "-1",
    "nan",
    "inf",
    "1000000000",
    "9223372036854775808",
    "1e300",
    "abc",
    "-2",
    "1e-300",
    "0.5",
    "2",
]
SETTING_VALUES += ["3 5 7", "none", "true", "-inf", "1", "18446744073709551616", "7", "", "1e400", "1_00", "5000"]
# the first value of some, met in use
FIRST = {"patch_size": "0", "depth": "-2"}
# with large values of these a run takes long, and is not absurd
LONG = {
    "epochs",
    "samples_per_epoch",
    "batch_size",
    "micro_batch_size",
    "crops",
    "workers",
    "local_views",
    "global_views",
}


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A numeric setting: 0, -1, nan, inf, huge, wrong type; the run is then made, if it is short."""
    (folder / "in").mkdir()
    program, name = NUMERIC[number % len(NUMERIC)]
    order = random.Random(name)
    values = order.sample(SETTING_VALUES, len(SETTING_VALUES))
    turn = number // len(NUMERIC)
    value = (FIRST.get(name, values[0]) if turn == 0 else values[turn % len(values)]).split(" ")
    words = base_words(program, name, order, bench)
    if rng.random() < 0.3:
        plain_value = yaml.safe_load(value[0]) if len(value) == 1 else [yaml.safe_load(v) for v in value]
        (folder / "in/settings.yaml").write_text(yaml.safe_dump({name: plain_value}))
        given = ["--config", "in/settings.yaml"]
        while f"--{name}" in words:
            place = words.index(f"--{name}")
            end = next((i for i in range(place + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[place:end]
    else:
        given = [f"--{name}", *value]
    if program in ("pretrain", "finetune"):
        bench.warm_cache(folder, words[1] if program == "pretrain" else "finetuned")
        if name in LONG:
            program = {"pretrain": "build_pretraining", "finetune": "build_finetuning"}[program]
    return [program, *words, *given]


def base_words(program: str, name: str, order: random.Random, bench: Bench) -> Words:
    """Return arguments of a short run of a program in which the setting is used."""
    scans, preset = str(bench.data / "imagesTr"), bench.folder / "preset.yaml"
    model, made = str(bench.folder / "finetuned/out"), str(bench.folder / "predicted/out")
    if program == "pretrain":
        allowed = settings_of(CLASSES[program])[name].when.get("method", tuple(PRETRAIN))
        return pretrain_words(order.choice(allowed), "--datalist", scans)
    if program == "finetune":
        words = finetune_words(preset, bench.data)
        return words
    return {
        "predict": ["--checkpoint", model, "--images", scans, "--out", "out"],
        "evaluate": [
            "--predictions",
            made,
            "--labels",
            str(bench.data / "labelsTr"),
            "--preset",
            str(preset),
            "--out",
            "out",
        ],
        "sweep": ["--preset", str(preset), "--data", str(bench.data), "--out", "out", "--updates", "40", "--slurm"],
        "cache": ["--datalist", scans, "--cache_dir", "cache"],
    }[program]
