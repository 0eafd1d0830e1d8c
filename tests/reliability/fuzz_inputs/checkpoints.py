"""Changed checkpoints: bytes, values, shapes, layouts and pickled code."""

import argparse
import random
import shutil
from pathlib import Path

import torch

from common import checkpoint
from tests.reliability.fuzz_inputs.bench import PRETRAIN, RAN, Bench, Words, finetune_words, pretrain_words
from tests.reliability.fuzz_inputs.changes import change_entry, change_value, damaged


class Payload:
    """Unpickling it creates the file RAN: what a checkpoint must never do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "ran")


def changed_checkpoint(rng: random.Random, source: Path, target: Path, ran: Path) -> None:
    content = checkpoint.load(source)
    kind = rng.randrange(8)
    if kind == 0:
        target.write_bytes(damaged(rng, source.read_bytes()))
        return
    if kind == 1:
        name = rng.choice(["args", "epoch", "code", "model"])
        content = Payload(ran) if rng.random() < 0.3 else content | {name: Payload(ran)}
    elif kind == 2:
        args = content.get("args", {})
        content["args"] = rng.choice([argparse.Namespace(**args), None, [], "x", {}])
    elif kind == 3:
        content = rng.choice([[], None, "x", torch.zeros(3), {}, {"model": {}}, {"model": {"a": 1}}, {1: 2}])
    elif kind == 4:
        state = next(v for k, v in content.items() if k in ("student", "state_dict", "model"))
        name = rng.choice([n for n, v in state.items() if v.is_floating_point() and v.ndim])
        state[name] = change_value(rng, state[name])
    else:
        for _ in range(rng.choice([1, 1, 2])):
            change_entry(rng, content)
    torch.save(content, target, _use_new_zipfile_serialization=rng.random() < 0.8)


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A checkpoint: bytes, values, shapes, sparse and expanded tensors, NaN, pickled code; every reader."""
    program = ("init", "predict", "predict", "resume", "init", "resume_finetuning", "leakage")[number % 7]
    (folder / "in").mkdir()
    place = folder / "in/checkpoint-last.pth"
    method = rng.choice(list(PRETRAIN))
    own = "finetuned" if program in ("predict", "resume_finetuning") else method
    changed_checkpoint(rng, bench.folder / own / "out/checkpoint-last.pth", place, folder / RAN)
    data, preset = bench.data, bench.folder / "preset.yaml"
    if program == "init":
        model = [
            "--model",
            "mim",
            "--embed_dim",
            "none",
            "--depth",
            "none",
            "--roi",
            "64",
            "32",
            "32",
            "--size",
            "tiny",
        ]
        more = [*model, "--embed_dims", "4", "8", "12", "16", "--depths", "1", "--patch_size", "16"]
        more = [*(more if method == "mim" else ["--depth", "1"]), "--model", "mim" if method == "mim" else "linear"]
        return ["build_finetuning", *finetune_words(preset, data, "--init", place, *more)]
    if program == "predict":
        return ["predict", "--checkpoint", "in", "--images", str(data / "imagesTr"), "--out", "out"]
    if program == "leakage":
        words = ["--pretrain", place, "--finetune", preset, "--data", data, "--cache_dir", "cache"]
        return ["leakage", *map(str, words)]
    bench.warm_cache(folder, own)
    (folder / "out").mkdir()
    resume = "in/checkpoint-last.pth"
    if rng.random() < 0.5:
        resume = "auto"
        shutil.copy(place, folder / "out")
    if program == "resume":
        return ["pretrain", *pretrain_words(method, "--datalist", data / "imagesTr", "--resume", resume)]
    return ["finetune", *finetune_words(preset, data, "--resume", resume)]
