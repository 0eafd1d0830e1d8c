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
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint, distributed, signals
from common.cache.build import build_cache
from common.cache.statistics import InputStatistics, input_statistics
from common.cli import parse, run_program
from common.config import shown, to_dict
from common.data.datalist import Case
from common.distributed import Run
from common.errors import InputError
from common.files import check_creatable, check_writable, digest
from common.runlog import RunLog, print_main
from common.training.schedules import warmup_cosine
from common.training.settings import BatchPlan, plan_updates
from common.training.summary import start_summary, update_flop
from common.training.trainer import Trainer
from common.watchdog import Watchdog
from Finetune.architectures import build_model, load_encoder, resolve
from Finetune.cases import check_classes, few_labels, find_cases, split, with_mapped_labels
from Finetune.contract import contract_warning, weights_sha256
from Finetune.data import CropDataset, VolumeDataset, Volumes
from Finetune.engine_finetune import Finetuning, SegmentationLosses, make_optimizer, validate, validate_classes
from Finetune.heads import HEADS, Architecture
from Finetune.inference.ensemble import BEST
from Finetune.inference.sliding_window import Window
from Finetune.leakage import leak_of
from Finetune.losses import class_weights, classification_losses, start_at_prior
from Finetune.presets import Preset, load_preset
from Finetune.settings import FinetuneSettings, check_settings, initial_checkpoint, weights_key

CROPS_AT_BLR = 16


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
    cases = choose_cases(config, preset)
    (check_creatable if config.dry_run else check_writable)(config.out_dir)
    training, validation = prepare_volumes(*cases, config, preset, run)
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
    differences = contract_warning(weights_from, preset, input_statistics(training)) if weights_from else ""
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
            # a run that goes on with other weights would be recorded as theirs
            "init_sha256": args["init_sha256"],
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


def choose_cases(config: FinetuneSettings, preset: Preset) -> tuple[list[Case], list[Case]]:
    """Return the (training, validation) cases. InputError if the data are not found."""
    chosen = config.cases
    training, validation = split(find_cases(preset, chosen.data, chosen.data_root), preset, chosen.fold)
    return few_labels(training, preset, chosen.label_count, chosen.label_fraction, chosen.label_seed), validation


def prepare_volumes(
    training: list[Case], validation: list[Case], config: FinetuneSettings, preset: Preset, run: Run
) -> tuple[Volumes, Volumes]:
    """Return the cached (training, validation) cases. Rank 0 fills the cache first."""
    chosen = config.cases
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
    elif preset.regions:
        losses = SegmentationLosses(preset)
    else:
        losses = SegmentationLosses(preset, prepare_for_classes(config, model, architecture, training))
    head_warmup = round(config.optim.head_warmup_epochs * plan.steps_per_epoch)
    return Finetuning(model, losses, config.freeze or HEADS[architecture.model].frozen, head_warmup)


def prepare_for_classes(
    config: FinetuneSettings, model: nn.Module, architecture: Architecture, training: Volumes
) -> Tensor | None:
    """Start the last layer at the classes' shares of the voxels, if asked for. Return their weights (K,), or None."""
    head = HEADS[architecture.model]
    at_prior = head.prior_bias if config.prior_bias == "auto" else config.prior_bias == "on"
    if not (at_prior or config.class_balance):
        return None
    counts = count_voxels(training, architecture.out_channels)
    if at_prior:
        start_at_prior(head.output_bias(model), counts, config.class_balance)
    return class_weights(counts, config.class_balance) if config.class_balance else None


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
    """Return what run.json holds about the run besides its settings.

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
