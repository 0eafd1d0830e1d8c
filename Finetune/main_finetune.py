"""Fine-tune an encoder for segmentation or classification: data of a preset, a checkpoint, a network.

    python -m Finetune.main_finetune --preset BTCV --data DIR --init checkpoint.pth --out_dir runs/btcv
    torchrun --nproc_per_node=4 -m Finetune.main_finetune ...

The learning rate is `blr` at 16 crops per update, scaled linearly as in the authors' code. Neither paper publishes
epochs and learning rate for BTCV; the defaults are our choice, to be used for every initialisation in a comparison.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import checkpoint, distributed, signals
from common.cache.build import build_cache
from common.cache.statistics import InputStatistics, input_statistics
from common.cli import parse, run_program
from common.config import group, setting, shown, to_dict
from common.data.datalist import DATA_ROOT_HELP
from common.distributed import Run
from common.errors import InputError
from common.files import check_creatable, check_writable, digest
from common.runlog import RunLog, print_main
from common.training.checkpointing import CheckpointSettings
from common.training.optim import OptimSettings
from common.training.schedules import warmup_cosine
from common.training.settings import BatchPlan, LoopSettings, plan_updates
from common.training.summary import start_summary, update_flop
from common.training.trainer import Trainer
from common.watchdog import Watchdog
from Finetune import leakage
from Finetune.architectures import ModelSettings, build_model, load_encoder, model_for, resolve
from Finetune.cases import check_classes, few_labels, find_cases, split, with_mapped_labels
from Finetune.contract import contract_warning, recorded_args, weights_sha256
from Finetune.data import CropDataset, VolumeDataset, Volumes
from Finetune.engine_finetune import Finetuning, make_optimizer, segmentation_losses, validate, validate_classes
from Finetune.heads import HEADS, Architecture
from Finetune.inference.ensemble import BEST
from Finetune.inference.sliding_window import Window
from Finetune.losses import class_weights, classification_losses
from Finetune.presets import Preset, load_preset

CROPS_AT_BLR = 16
# heads whose encoder is never trained
FROZEN = [name for name, head in HEADS.items() if head.frozen]


# ---------------------------------------------------------------- settings


@dataclass(kw_only=True)
class DataSettings:
    """Settings that choose the data set and the fold."""

    preset: str = setting(help="data set: a name in Finetune/datasets/, or the path of a custom YAML")
    data: Path = setting(help="its folder in the published layout, or a Decathlon JSON")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    cache_dir: Path = setting(Path("cache"), "folder of preprocessed volumes; missing ones are added at the start")
    fold: int = setting(0, "fold that validates; the others train", least=0)


@dataclass(kw_only=True)
class CaseSettings(DataSettings):
    """Settings that choose the cases: the data set, the fold, and a subset of the training cases."""

    label_count: int | None = setting(None, "number of training cases; smaller sets are nested in larger ones", least=1)
    label_fraction: float | None = setting(None, "fraction of the training cases, nested likewise", above=0, most=1)
    label_seed: int = setting(0, "seed of the order in which cases are taken")


@dataclass(kw_only=True)
class StartSettings:
    """Settings of the initial weights."""

    init: str = setting("scratch", "scratch, or a checkpoint or exported folder whose encoder is loaded")
    checkpoint: Path | None = setting(None, "the same as --init FILE")
    checkpoint_key: str = setting(
        "auto", "where the weights are in the file, e.g. teacher; auto: the first of student, state_dict and model"
    )
    scratch_twin: bool = setting(False, "same run and architecture as with --init FILE, but with random weights")
    standardize: bool = setting(
        True,
        "random weights: initialise the patch embedding for mean and standard deviation of the training volumes, as in "
        "pretraining",
    )


@dataclass(kw_only=True)
class FinetuneOptimSettings(OptimSettings):
    """Settings of AdamW in fine-tuning."""

    blr: float = setting(1e-4, "learning rate at 16 crops per update, scaled linearly", least=0)
    warmup_epochs: float = setting(50.0, "epochs of linear warm-up", least=0)
    weight_decay: float = setting(1e-5, "weight decay, not applied to biases, norms and tokens", least=0)
    clip_grad: float | None = setting(1.0, "largest norm of the gradient; none: no clipping", above=0)
    layer_decay: float | None = setting(None, "learning rate factor per block, towards the input", above=0, most=1)
    head_warmup_epochs: float = setting(0.0, "epochs at the start in which only the head is trained", least=0)


@dataclass(kw_only=True)
class FinetuneCheckpointSettings(CheckpointSettings):
    """Settings of checkpoints in fine-tuning."""

    save_every: int = setting(500, "epochs between the checkpoints that are kept", least=1)


@dataclass(kw_only=True)
class ValidationSettings:
    """Settings of the validation within a run. Finetune.predict uses its sliding window too."""

    validate_every: int = setting(50, "epochs between validations; 0: never", least=0)
    overlap: float = setting(0.5, "overlap of the sliding window", least=0, below=1)
    blending: Literal["gaussian", "constant"] = setting("gaussian", "blending of windows; the authors': constant")
    sw_batch_size: int = setting(2, "windows per forward pass", least=1)
    select: Literal["last", "best"] = setting("last", "best: also keep and report the best checkpoint in validation")


@dataclass(kw_only=True)
class FinetuneSettings(LoopSettings):
    """Settings of a fine-tuning run."""

    cases: CaseSettings = group(CaseSettings, "Data, fold and labels")
    network: ModelSettings = group(ModelSettings, "Network")
    start: StartSettings = group(StartSettings, "Initial weights")
    optim: FinetuneOptimSettings = group(FinetuneOptimSettings, "Optimiser")
    checkpoints: FinetuneCheckpointSettings = group(FinetuneCheckpointSettings, "Checkpoints")
    validation: ValidationSettings = group(ValidationSettings, "Validation")
    freeze: bool = setting(False, f"train only the head; always so for --model {' or '.join(FROZEN)}")
    epochs: int = setting(3000, "passes over the data", least=1, most=10**9)
    batch_size: int = setting(4, "volumes per update, over all processes together", least=1, most=65536)
    micro_batch_size: int | None = setting(1, "volumes per pass and process; the rest accumulates", least=1, most=65536)
    crops: int = setting(4, "crops per volume", least=1, most=1024)
    class_balance: float = setting(
        0.0,
        "weight classes in the cross-entropy by their share of the training voxels to the power -class_balance",
        least=0,
        most=1,
    )
    order_seed: int | None = setting(
        None, "seed of data order, crops and augmentation; none: --seed", least=-(2**63), most=2**63 - 1
    )


def check_settings(config: FinetuneSettings, preset: Preset) -> None:
    """Set the network that is the default for the task. Raise InputError for settings that contradict each other."""
    model = config.network.model = model_for(config.network.model, preset)
    if config.validation.select == "best" and not config.validation.validate_every:
        raise InputError("--select best: expected a validation, found --validate_every 0")
    if config.class_balance and (preset.regions or preset.task == "classification"):
        expected = "0 for a preset with regions or of classification"
        raise InputError(f"--class_balance {config.class_balance}: expected {expected}, as {preset.name} is")
    encoder_only = {"freeze": config.freeze, "grad_checkpointing": config.precision.grad_checkpointing}
    encoder_only |= {name: getattr(config.optim, name) for name in ("layer_decay", "head_warmup_epochs")}
    for name, value in encoder_only.items():
        if value and HEADS[model].encoder is None:
            raise InputError(f"--{name}: --model {model} has no encoder")


def initial_checkpoint(start: StartSettings) -> Path | None:
    """Return the file that --init or --checkpoint names, None for scratch."""
    if start.checkpoint and start.init != "scratch":
        raise InputError(f"--checkpoint {start.checkpoint}: found --init {start.init} too, expected one of the two")
    init = start.checkpoint or (None if start.init == "scratch" else Path(start.init))
    if start.scratch_twin and init is None:
        raise InputError("--scratch_twin: expected --init FILE too")
    return init


def weights_key(start: StartSettings) -> str | None:
    """Return the key of the weights in the initial checkpoint, None for the usual ones."""
    return None if start.checkpoint_key == "auto" else start.checkpoint_key


# ---------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> Path | None:
    """Run the program. Return the path of the last checkpoint, None with `--dry_run`."""
    config = parse(FinetuneSettings, argv, description=__doc__)
    if not config.dry_run:
        signals.write_marker_on_stop(config.out_dir)
    preset = load_preset(config.cases.preset)
    check_settings(config, preset)
    init = initial_checkpoint(config.start)
    architecture = resolve(config.network, preset, init, weights_key(config.start))
    run = distributed.setup(config.device)
    try:
        return finetune(config, preset, architecture, init, run)
    finally:
        distributed.shutdown()


def finetune(
    config: FinetuneSettings, preset: Preset, architecture: Architecture, init: Path | None, run: Run
) -> Path | None:
    """Fine-tune to the last epoch. Return the path of the last checkpoint, None with `--dry_run`."""
    (check_creatable if config.dry_run else check_writable)(config.out_dir)
    training, validation = prepare_volumes(config, preset, run)
    weights_from = None if config.start.scratch_twin else init
    plan = plan_updates(config, len(training), run.world_size)
    method = build_method(config, preset, architecture, weights_from, run, plan, training)
    random_encoder = HEADS[architecture.model].encoder and not weights_from
    inputs = standardize(method, training) if random_encoder and config.start.standardize else None
    optim = config.optim
    peak = optim.peak_lr(plan.batch * config.crops, CROPS_AT_BLR)
    warmup = round(min(optim.warmup_epochs, config.epochs / 2) * plan.steps_per_epoch)
    args = describe(config, preset, architecture, weights_from, training, validation) | {"inputs": to_dict(inputs)}
    order_seed = config.seed if config.order_seed is None else config.order_seed
    if preset.task == "classification":
        dataset = VolumeDataset(training, preset, architecture.roi, order_seed)
    else:
        dataset = CropDataset(training, architecture.roi, preset.augmentation, config.crops, order_seed)
    flop = update_flop(method, dataset, loss_weights, plan)
    fold = f"fold {config.cases.fold}"
    rows = {
        "model": f"{architecture.model}, crops of {shown(architecture.roi)} voxels, patches of "
        f"{shown(architecture.patch_size)}; encoder from {weights_from or 'random weights'}",
        "data": f"{preset.name} {fold}: {len(training)} cases train, {len(validation)} validate",
        "crops": f"{config.crops} per volume; {plan.batch * config.crops} per update",
        "rate": f"learning rate {peak:.3g} after {warmup:,} updates of warm-up",
    }
    print_main(start_summary(f"{preset.name}: fine-tuning", rows, method, config, plan, run, flop))
    differences = contract_warning(weights_from, preset) if weights_from else ""
    for warning in filter(None, (args["leak"] and f"{fold}: {args['leak']}", differences)):
        print_main(f"warning: {warning}")
    trainer = Trainer(
        method,
        dataset,
        config,
        run,
        plan,
        learning_rate=lambda step: warmup_cosine(step, plan.total_steps, warmup, peak),
        loss_weights=loss_weights,
        args=args,
        about=about(config, preset, architecture, args),
        data_fingerprint={
            "training data": digest([*(e.content_hash for e in training), preset.preprocessing]),
            "validation data": digest([e.content_hash for e in validation]),
            "crops": [config.crops, *architecture.roi],
        },
        order_seed=order_seed,
        make_optimizer=partial(make_optimizer, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay),
        after_epoch=Validation(config, preset, architecture, validation, run, plan, args),
    )
    if config.dry_run:
        return trainer.dry_run()
    path = trainer.fit()
    print_main(f"done: {path}")
    return path


def loss_weights(step: int) -> dict[str, float]:
    """Return the weights of the losses, at every step the same; a method reports those that it has."""
    return {"dice": 1.0, "ce": 1.0}


def prepare_volumes(config: FinetuneSettings, preset: Preset, run: Run) -> tuple[Volumes, Volumes]:
    """Return the cached (training, validation) cases. Rank 0 fills the cache first."""
    chosen = config.cases
    training, validation = split(find_cases(preset, chosen.data, chosen.data_root), preset, chosen.fold)
    training = few_labels(training, preset, chosen.label_count, chosen.label_fraction, chosen.label_seed)
    with distributed.main_first(), Watchdog(config.hang_minutes):
        cases = with_mapped_labels([*training, *validation], preset, chosen.cache_dir / "labels")
        volumes = build_cache(cases, preset.preprocessing, chosen.cache_dir, workers=config.workers)
    check_classes(volumes, preset)
    return volumes[: len(training)], volumes[len(training) :]


def build_method(
    config: FinetuneSettings,
    preset: Preset,
    architecture: Architecture,
    init: Path | None,
    run: Run,
    plan: BatchPlan,
    training: Volumes,
) -> Finetuning:
    """Return the network, with the encoder of `init` if given, and its losses."""
    # all weights from the seed, so that a scratch twin has the same head
    torch.manual_seed(config.seed)
    model = build_model(architecture)
    if init:
        load_encoder(model, init, weights_key(config.start), HEADS[architecture.model].decoder)
    if config.precision.grad_checkpointing:
        model.backbone.set_grad_checkpointing()
    # for the hybrid's map of stride 32, as in the authors' code
    if run.world_size > 1 and run.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if preset.task == "classification":
        losses = classification_losses
    else:
        balance = config.class_balance
        weight = class_weights(count_voxels(training, preset.out_channels), balance).to(run.device) if balance else None
        losses = segmentation_losses(preset, weight)
    head_warmup = round(config.optim.head_warmup_epochs * plan.steps_per_epoch)
    return Finetuning(model, losses, config.freeze or HEADS[architecture.model].frozen, head_warmup)


def count_voxels(volumes: Volumes, classes: int) -> Tensor:
    """Return the number of voxels of each class (K,) in the labels of cached volumes."""
    labels = (volume.read_label((0, 0, 0), volume.shape) for volume in volumes)
    return sum(torch.bincount(label.flatten().long(), minlength=classes) for label in labels)


def standardize(method: Finetuning, training: Volumes) -> InputStatistics:
    """Initialise the random encoder for the voxels of the training volumes. Return their mean and deviation."""
    inputs = input_statistics(training)
    method.model.backbone.standardize_input(inputs.mean, inputs.std)
    return inputs


def describe(
    config: FinetuneSettings,
    preset: Preset,
    architecture: Architecture,
    init: Path | None,
    training: Volumes,
    validation: Volumes,
) -> dict[str, Any]:
    """Return what the checkpoint stores for Finetune.predict and the score card, in plain types."""
    return {
        "config": to_dict(config),
        "preset": to_dict(preset),
        "architecture": to_dict(architecture),
        "grid_size": list(architecture.grid_size),
        "init": str(init) if init else "scratch",
        "init_sha256": weights_sha256(init) if init else None,
        "training_cases": [volume.name for volume in training],
        "validation_cases": [volume.name for volume in validation],
        "selected": "last",
        "leak": leak_of(config.cases.fold, preset, init, validation),
    }


def about(config: FinetuneSettings, preset: Preset, architecture: Architecture, args: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json tells about the run beyond its settings.

    Args:
        args: what `describe` returns.
    """
    return {
        "program": "fine-tuning",
        "title": f"{preset.name}, fold {config.cases.fold}",
        "task": preset.task,
        "network": architecture.model,
        "roi": list(architecture.roi),
        "patch_size": list(architecture.patch_size),
        "initial_weights": args["init"],
        "training_cases": len(args["training_cases"]),
        "validation_cases": len(args["validation_cases"]),
        "labels_by": preset.labels_by,
        "leak": args["leak"],
    }


def leak_of(fold: int, preset: Preset, init: Path | None, validation: Volumes) -> str:
    """Return a warning if pretraining has seen validation cases, or may have; else "".

    Cases are compared by the content of the volumes if the checkpoint lists its data, else by what the preset states.
    """
    if init is None:
        return ""
    # resolve and load_encoder have verified the file
    seen = leakage.seen_cases({"args": recorded_args(init)}, validation)
    if seen is not None:
        found = f"{len(seen)} of {len(validation)} validation cases were seen in pretraining: {', '.join(seen)}"
        return found if seen else ""
    # the folds of a list may hold other cases than those of the preset
    if fold in preset.clean_folds and {volume.name for volume in validation} <= set(preset.validation):
        return ""
    return preset.leak or "unknown: the checkpoint does not record what it was pretrained on"


# ---------------------------------------------------------------- validation


@dataclass
class Validation:
    """Validates after every `validate_every` epochs and after the last one, and keeps the best checkpoint if asked to.

    The trainer calls it after each epoch. `args` is stored in checkpoint-best.pth.
    """

    config: FinetuneSettings
    preset: Preset
    architecture: Architecture
    volumes: Volumes
    run: Run
    plan: BatchPlan
    args: dict[str, Any]
    best: float | None = None

    def __call__(self, epoch: int, log: RunLog, method: Finetuning) -> dict[str, float]:
        """Return the scores to log for this epoch, {} if no validation is due."""
        done = epoch + 1
        if not self.volumes or not self.config.is_due(epoch, self.config.validation.validate_every):
            return {}
        name, scores = self.scores(method.model, last=done == self.config.epochs)
        log.add_scalars(scores, done * self.plan.steps_per_epoch - 1)
        print_main(f"epoch {done}: validation {name} {scores[f'val/{name}']:.4f}")
        if self.config.validation.select == "best":
            self.keep_best(scores[f"val/{name}"], epoch, method)
        return scores

    def scores(self, model: nn.Module, last: bool) -> tuple[str, dict[str, float]]:
        """Return the name of the score that selects, and all scores."""
        config, roi, amp = self.config, self.architecture.roi, self.config.precision.amp
        if self.preset.task == "classification":
            out = config.out_dir if last else None
            return "accuracy", validate_classes(model, self.volumes, self.preset, roi, self.run, amp, out)
        window = Window(roi, config.validation.overlap, config.validation.blending, config.validation.sw_batch_size)
        return "dice", validate(model, self.volumes, self.preset, window, self.run, amp)

    def keep_best(self, score: float, epoch: int, method: Finetuning) -> None:
        """Write checkpoint-best.pth if `score` is the best so far."""
        if self.best is None:
            self.best = best_so_far(self.config.out_dir)
        if score > self.best and self.run.rank == 0:
            step = (epoch + 1) * self.plan.steps_per_epoch
            args = self.args | {"selected": "best", "best": score, "step": step}
            checkpoint.save(self.config.out_dir / BEST, method.checkpoint_state() | {"epoch": epoch, "args": args})
        self.best = max(self.best, score)


def best_so_far(out_dir: Path) -> float:
    """Return the score of checkpoint-best.pth, so that a resumed run does not replace it by a worse one; else -1."""
    path = out_dir / BEST
    try:
        return checkpoint.load(path)["args"]["best"] if path.exists() else -1.0
    except InputError as error:
        print_main(f"warning: {error}; the next validation counts as the best so far")
        return -1.0


if __name__ == "__main__":
    sys.exit(run_program(main))
