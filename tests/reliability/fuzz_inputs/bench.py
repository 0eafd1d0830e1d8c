"""The programs that inputs are given to, and the valid inputs that are changed."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import generate_cache_files
from Finetune import evaluate, main_finetune, predict, sweep
from Finetune.architectures import build_model, resolve
from Pretrain import main_pretrain
from Pretrain.build import build_task, settings_class
from scripts import check_leakage
from scripts.synthetic_ct import affine_of, phantom, write_dicom, write_nifti

Words = list[str]
SHAPE, SPACING = (20, 18, 16), (9.0, 10.0, 12.0)
RAN = "the code in the pickle ran"
TINY = "--embed_dim 12 --depth 3 --num_heads 2 --feature_size 4 --roi 16 --patch_size 8".split()
QUICK = "--epochs 1 --batch_size 1 --workers 0 --warmup_epochs 0 --log_every 1 --samples_per_epoch 1".split()
PRETRAIN = {
    "mae": "--model tiny --embed_dim 12 --depth 1 --num_heads 2 --patch_size 8",
    "glmae": "--model tiny --embed_dim 12 --depth 1 --num_heads 2 --patch_size 8 --global_size 16 --global_views 2 "
    "--hidden_dim 8 --bottleneck_dim 4 --out_dim 8",
    "mim": "--model tiny --embed_dims 4 8 12 16 --depths 1 --num_heads 2 --num_mid 1 --num_down 1",
}
DECODER = "--decoder_embed_dim 12 --decoder_depth 1 --decoder_num_heads 2 --local_views 1".split()
PRESET = {
    "name": "tiny",
    "description": "three organs",
    "labels": {0: "background", 1: "spleen", 2: "kidney", 3: "liver"},
    "roi": [16, 16, 16],
    "patch_size": [8, 8, 8],
    "intensity": "window",
    "low": -175,
    "high": 250,
    "folds": 2,
    "layout": {"datalist": "dataset.json"},
}


def run_module(main: Callable[[], Any]) -> Callable[[Words], Any]:
    """Return a program that takes its arguments from sys.argv as a function of them."""

    def run(argv: Words) -> Any:
        sys.argv = ["program", *argv]
        return main()

    return run


def build_pretraining(argv: Words) -> None:
    """Build what a pretraining run builds, without its data: for settings with which a run would take long."""
    from common.cli import parse
    from common.training.settings import plan_updates

    settings = parse(settings_class(), argv)
    build_task(settings, plan_updates(settings, 3, 1))


def build_finetuning(argv: Words) -> None:
    """Build the network of a fine-tuning run, without its data."""
    from common.cli import parse
    from common.training.settings import plan_updates
    from Finetune.presets import load_preset
    from Finetune.settings import FinetuneSettings, check_settings, initial_checkpoint

    config = parse(FinetuneSettings, argv)
    preset = load_preset(config.cases.preset)
    check_settings(config, preset)
    plan_updates(config, 3, 1)
    build_model(resolve(config.network, preset, initial_checkpoint(config.start)))


PROGRAMS: dict[str, Callable[[Words], Any]] = {
    "cache": run_module(generate_cache_files.main),
    "pretrain": run_module(main_pretrain.main),
    "build_pretraining": build_pretraining,
    "build_finetuning": build_finetuning,
    "finetune": main_finetune.main,
    "predict": predict.main,
    "evaluate": evaluate.main,
    "sweep": sweep.main,
    "leakage": run_module(check_leakage.main),
}


def finetune_words(preset: Path, data: Path, *more: object) -> Words:
    words = ["--preset", preset, "--data", data, "--cache_dir", "cache", "--out_dir", "out", *TINY, *QUICK, *more]
    return list(map(str, words))


def pretrain_words(method: str, *more: object) -> Words:
    size = "16" if method != "mim" else "32"
    words = ["--method", method, *PRETRAIN[method].split(), *DECODER, "--local_size", size, *QUICK]
    return list(map(str, [*words, "--cache_dir", "cache", "--out_dir", "out", *more]))


@dataclasses.dataclass(frozen=True)
class Bench:
    """The valid inputs in a folder: scans and labels, a preset, a series, checkpoints, label maps, a score card."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name

    def prepare(self, run: Callable[[Path, Words], None]) -> None:
        """Write the inputs. `run(folder, words)` runs a program in a folder."""
        entries = []
        for number in range(3):
            hu, label = phantom(SHAPE, seed=number)
            write_nifti(self.data / f"imagesTr/c{number}.nii.gz", hu, affine_of(SHAPE, SPACING))
            write_nifti(self.data / f"labelsTr/c{number}.nii.gz", label.clip(max=3), affine_of(SHAPE, SPACING))
            entries.append({"image": f"imagesTr/c{number}.nii.gz", "label": f"labelsTr/c{number}.nii.gz"})
        (self.data / "dataset.json").write_text(json.dumps({"training": entries, "test": []}))
        (self.folder / "preset.yaml").write_text(yaml.safe_dump(PRESET))
        write_dicom(self.series, phantom((16, 14, 8))[0], affine_of((16, 14, 8), (12.0, 14.0, 20.0)))
        preset = self.folder / "preset.yaml"
        run(self.folder / "finetuned", ["finetune", *finetune_words(preset, self.data)])
        for method in PRETRAIN:
            run(self.folder / method, ["pretrain", *pretrain_words(method, "--datalist", self.data / "imagesTr")])
        model = self.folder / "finetuned/out"
        words = ["predict", "--checkpoint", model, "--images", self.data / "imagesTr", "--out", "out"]
        run(self.folder / "predicted", list(map(str, words)))

    def copy_data(self, folder: Path) -> Path:
        shutil.copytree(self.data, folder / "in/data")
        return folder / "in/data"

    def warm_cache(self, folder: Path, program: str) -> None:
        shutil.copytree(self.folder / program / "cache", folder / "cache")
