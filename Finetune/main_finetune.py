"""Fine-tune an encoder for segmentation: a preset's data, a checkpoint, a network.

    python -m Finetune.main_finetune --preset BTCV --data DIR --init checkpoint.pth --out_dir runs/btcv
    torchrun --nproc_per_node=4 -m Finetune.main_finetune ...

The learning rate is `blr` at 16 crops per update, scaled linearly (the authors' rule); BTCV's epochs and learning rate
are shipped by neither paper: ours, the same for every initialisation that is compared.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from common import checkpoint, distributed, files, signals
from common.cache import build, volume
from common.cli import parse, run_program
from common.config import group, setting, to_dict
from common.data.datalist import DATA_ROOT_HELP
from common.distributed import Run
from common.errors import InputError
from common.files import check_writable, digest
from common.runlog import RunLog, print_main
from common.training.checkpointing import CheckpointSettings
from common.training.optim import OptimSettings
from common.training.schedules import warmup_cosine
from common.training.settings import LoopSettings, plan_updates
from common.training.trainer import Trainer
from common.watchdog import Watchdog
from Finetune import leakage
from Finetune.architectures import ModelSettings, build_model, load_encoder, model_for, resolve
from Finetune.cases import check_classes, few_labels, find_cases, split, with_mapped_labels
from Finetune.data import CropDataset, VolumeDataset
from Finetune.engine_finetune import Finetuning, make_optimizer, segmentation_losses, validate, validate_classes
from Finetune.heads import HEADS, Architecture
from Finetune.inference.sliding_window import Window
from Finetune.losses import classification_losses
from Finetune.presets import Preset, load_preset

CROPS_AT_BLR = 16
BEST = "checkpoint-best.pth"


@dataclass(kw_only=True)
class FinetuneOptimSettings(OptimSettings):
    """Settings of AdamW in fine-tuning."""

    blr: float = setting(1e-4, "learning rate at 16 crops per update, scaled linearly", least=0)
    warmup_epochs: float = setting(50.0, "epochs of linear warm-up", least=0)
    weight_decay: float = setting(1e-5, "weight decay, not applied to biases, norms and tokens", least=0)
    clip_grad: float | None = setting(1.0, "largest norm of the gradient; none: no clipping", above=0)
    layer_decay: float | None = setting(
        None, "factor of the learning rate per encoder block towards the input", above=0, most=1
    )


@dataclass(kw_only=True)
class FinetuneCheckpointSettings(CheckpointSettings):
    """Settings of checkpoints in fine-tuning."""

    save_every: int = setting(500, "epochs between the checkpoints that are kept", least=1)


@dataclass(kw_only=True)
class FinetuneSettings(ModelSettings, LoopSettings):
    """Settings of a fine-tuning run."""

    preset: str = setting(help="data set: a name of Finetune/datasets/, or the path of a YAML of one's own")
    data: Path = setting(help="its folder in the published layout, or a Decathlon JSON")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    cache_dir: Path = setting(Path("cache"), "where preprocessed volumes are kept; missing ones are added at the start")
    fold: int = setting(0, "this fold validates, the rest trains", least=0)
    label_count: int | None = setting(None, "train on this many cases; smaller sets are nested in larger ones")
    label_fraction: float | None = setting(None, "train on this share of the cases, nested likewise")
    label_seed: int = setting(0, "seed of the order in which cases are taken")

    init: str = setting("scratch", "scratch, or a checkpoint whose encoder is loaded")
    checkpoint: Path | None = setting(None, "the same as --init FILE")
    scratch_twin: bool = setting(False, "the same run and architecture with random weights instead of the checkpoint's")
    freeze: bool = setting(False, "train the head alone; always so for --model linear")

    epochs: int = setting(3000, "passes over the data", least=1)
    batch_size: int = setting(4, "volumes per update, over all processes together", least=1)
    micro_batch_size: int | None = setting(1, "volumes per process and forward pass; the rest is accumulated", least=1)
    crops: int = setting(4, "crops per volume", least=1)

    optim: FinetuneOptimSettings = group(FinetuneOptimSettings, "Optimiser")
    checkpoints: FinetuneCheckpointSettings = group(FinetuneCheckpointSettings, "Checkpoints")

    validate_every: int = setting(50, "epochs between two validations; 0: never", least=0)
    overlap: float = setting(0.5, "overlap of the sliding window")
    blending: Literal["gaussian", "constant"] = setting("gaussian", "of overlapping windows; the authors': constant")
    sw_batch_size: int = setting(2, "windows per forward pass")
    select: Literal["last", "best"] = setting(
        "last", "best also keeps checkpoint-best.pth, picked by validation; the card says so"
    )


def main(argv: list[str] | None = None) -> Path:
    """Run the program; returns the path of the last checkpoint."""
    config = parse(FinetuneSettings, argv, description=__doc__)
    signals.write_marker_on_stop(config.out_dir)
    preset = load_preset(config.preset)
    config.model = model_for(config.model, preset)
    if config.select == "best" and not config.validate_every:
        raise InputError("--select best: picked by validation, which --validate_every 0 leaves out")
    init = initial_checkpoint(config)
    if HEADS[config.model].encoder is None:
        encoder_only = {
            "freeze": config.freeze,
            "layer_decay": config.optim.layer_decay,
            "grad_checkpointing": config.precision.grad_checkpointing,
        }
        for name, value in encoder_only.items():
            if value:
                raise InputError(f"--{name}: --model {config.model} has no encoder")
    architecture = resolve(config, preset, init)
    run = distributed.setup(config.device)
    try:
        return finetune(config, preset, architecture, init, run)
    finally:
        distributed.shutdown()


def finetune(config: FinetuneSettings, preset: Preset, architecture: Architecture, init: Path | None, run: Run) -> Path:
    check_writable(config.out_dir)
    window = Window(architecture.roi, config.overlap, config.blending, config.sw_batch_size)
    training, validation = prepare_entries(config, preset, run)
    torch.manual_seed(config.seed)
    model = build_model(architecture)  # head and encoder from the seed, so that a scratch twin has the same head
    if init and not config.scratch_twin:
        load_encoder(model, init)
    if config.precision.grad_checkpointing:
        model.backbone.set_grad_checkpointing()
    if run.world_size > 1 and run.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # MiM's stride-32 map, as the authors'
    losses = classification_losses if preset.task == "classification" else segmentation_losses(preset)
    method = Finetuning(model, losses, freeze=config.freeze or HEADS[config.model].frozen)
    plan = plan_updates(config, len(training), run.world_size)
    peak = config.optim.peak_lr(plan.batch * config.crops, CROPS_AT_BLR)
    warmup = round(min(config.optim.warmup_epochs, config.epochs / 2) * plan.steps_per_epoch)
    start = "random weights" if init is None or config.scratch_twin else str(init)
    cases = f"{len(training)} cases train, {len(validation)} validate"
    print_main(f"{preset.name} fold {config.fold}: {cases}; encoder from {start}")
    print_main(
        f"{architecture.model}, roi {architecture.roi}, patch {architecture.patch_size}, {count(method)} parameters; "
        f"{plan.batch} volumes x {config.crops} crops per update, {plan.total_steps} updates, lr {peak:.3g}"
    )
    args = describe(config, preset, architecture, init, [e.name for e in training], [e.name for e in validation])
    args["leak"] = leak_of(config, preset, init, training, validation)
    if args["leak"]:
        print_main(f"warning: fold {config.fold}: {args['leak']}")
    best = None

    def after_epoch(epoch: int, log: RunLog, method: Finetuning) -> dict[str, float]:
        nonlocal best
        last = epoch + 1 == config.epochs
        if not validation or not config.validate_every or ((epoch + 1) % config.validate_every and not last):
            return {}
        best = best_so_far(config.out_dir) if best is None else best
        if preset.task == "classification":
            name, out = "accuracy", config.out_dir if last else None
            scores = validate_classes(
                method.model, validation, preset, architecture.roi, run, config.precision.amp, out
            )
        else:
            name, scores = "dice", validate(method.model, validation, preset, window, run, config.precision.amp)
        log.add_scalars(scores, (epoch + 1) * plan.steps_per_epoch - 1)
        print_main(f"epoch {epoch + 1}: validation {name} {scores[f'val/{name}']:.4f}")
        if config.select == "best" and scores[f"val/{name}"] > best:
            best = scores[f"val/{name}"]
            if run.rank == 0:
                picked = args | {"selected": "best", "best": best, "step": (epoch + 1) * plan.steps_per_epoch}
                content = method.checkpoint_state() | {"epoch": epoch, "args": picked}
                checkpoint.save(config.out_dir / BEST, content)
        return scores

    if preset.task == "classification":
        dataset = VolumeDataset(training, preset, architecture.roi, config.seed)
    else:
        dataset = CropDataset(training, architecture.roi, preset.augmentation, config.crops, config.seed)
    trainer = Trainer(
        method,
        dataset,
        config,
        run,
        plan,
        learning_rate=lambda step: warmup_cosine(step, plan.total_steps, warmup, peak),
        loss_weights=lambda step: {"dice": 1.0, "ce": 1.0},
        args=args,
        data_fingerprint={
            "training data": digest([*(e.content_hash for e in training), preset.preprocessing]),
            "validation data": digest([e.content_hash for e in validation]),
            "crops": [config.crops, *architecture.roi],
        },
        make_optimizer=partial(
            make_optimizer, weight_decay=config.optim.weight_decay, layer_decay=config.optim.layer_decay
        ),
        recorded=to_dict(config),
        after_epoch=after_epoch,
    )
    path = trainer.fit()
    print_main(f"done: {path}")
    return path


def initial_checkpoint(config: FinetuneSettings) -> Path | None:
    """The file named by --init or --checkpoint, None for scratch."""
    if config.checkpoint and config.init != "scratch":
        raise InputError(f"--checkpoint {config.checkpoint} and --init {config.init}: give one of the two")
    init = config.checkpoint or (None if config.init == "scratch" else Path(config.init))
    if config.scratch_twin and init is None:
        raise InputError("--scratch_twin: needs --init FILE, whose twin it is")
    return init


def prepare_entries(
    config: FinetuneSettings, preset: Preset, run: Run
) -> tuple[list[volume.CachedVolume], list[volume.CachedVolume]]:
    """Cached (training, validation) cases. The first process fills the cache, the others wait."""
    training, validation = split(find_cases(preset, config.data, config.data_root), preset, config.fold)
    training = few_labels(training, preset, config.label_count, config.label_fraction, config.label_seed)

    def entries() -> list[volume.CachedVolume]:
        with Watchdog(config.hang_minutes):
            cases = with_mapped_labels([*training, *validation], preset, config.cache_dir / "labels")
            return build.build_cache(cases, preset.preprocessing, config.cache_dir, workers=config.workers)

    if run.rank == 0:
        entries()
    distributed.barrier()
    found = entries()
    check_classes(found, preset)
    return found[: len(training)], found[len(training) :]


def describe(
    config: FinetuneSettings,
    preset: Preset,
    architecture: Architecture,
    init: Path | None,
    training: list[str],
    validation: list[str],
) -> dict[str, Any]:
    """What the checkpoint keeps: all that predict and the score card need, in plain types."""
    return {
        "config": to_dict(config),
        "preset": to_dict(preset),
        "architecture": to_dict(architecture),
        "grid_size": list(architecture.grid_size),
        "init": "scratch" if init is None or config.scratch_twin else str(init),
        "init_sha256": files.file_sha256(init) if init and not config.scratch_twin else None,
        "training_cases": training,
        "validation_cases": validation,
        "selected": "last",
    }


def leak_of(
    config: FinetuneSettings,
    preset: Preset,
    init: Path | None,
    training: list[volume.CachedVolume],
    validation: list[volume.CachedVolume],
) -> str:
    """What is to be said of validation cases that pretraining has seen, or may have; empty when there are none.

    Told by the content of the volumes, where the checkpoint carries what it was trained on; else by the preset.
    """
    if init is None or config.scratch_twin:
        return ""
    card = leakage.card(checkpoint.load(init), training, validation)
    if card["known"]:
        return card["text"] if card["validation_seen"] else ""
    if config.fold in preset.clean_folds and {e.name for e in validation} <= set(preset.validation):
        return ""  # a list with folds of its own may mean others by that number
    return preset.leak or card["text"]


def best_so_far(out_dir: Path) -> float:
    """The score of checkpoint-best.pth when a run goes on, so that a worse one does not replace it."""
    path = out_dir / BEST
    try:
        return checkpoint.load(path)["args"]["best"] if path.exists() else -1.0
    except InputError as error:
        print_main(f"warning: {error}; the next validation counts as the best so far")
        return -1.0


def count(module: torch.nn.Module) -> str:
    """Trained parameters."""
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,}"


if __name__ == "__main__":
    sys.exit(run_program(main))
