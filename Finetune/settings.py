"""Settings of fine-tuning, and whether they agree with each other and with the preset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import group, setting
from common.data.datalist import DATA_ROOT_HELP
from common.errors import InputError
from common.training.checkpointing import CheckpointSettings
from common.training.optim import OptimSettings
from common.training.settings import LoopSettings
from Finetune.architectures import ModelSettings, model_for
from Finetune.heads import HEADS
from Finetune.presets import Preset

# heads whose encoder is never trained
FROZEN = [name for name, head in HEADS.items() if head.frozen]


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
    prior_bias: Literal["auto", "on", "off"] = setting(
        "auto", "start the last layer at the classes' shares of the training voxels; auto: heads that read tokens alone"
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
    if config.prior_bias == "on" and (HEADS[model].output_bias is None or preset.regions):
        expected = "auto or off for a preset with regions or of classification, and for a head without output_bias"
        raise InputError(f"--prior_bias on: found --model {model} and {preset.name}, expected {expected}")
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
