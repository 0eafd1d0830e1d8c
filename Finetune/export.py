"""Export an encoder as a folder with its weights and what is needed to use them.

    python -m Finetune.export runs/mine/checkpoint-last.pth --to exported --key teacher
    python -m Finetune.export monai_vit.pth --source monai_vit --to exported       from another library's names
    python -m Finetune.export runs/mine/checkpoint-last.pth --format monai_unetr --to for_monai
    python -m Finetune.export runs/mine/checkpoint-last.pth --format monai_vit --class_token --to for_monai

The folder holds `model.safetensors`, `config.json` (class, arguments, preprocessing, training data, origin) and
`README.md`, as huggingface_hub lays out a model. Read it with `VisionTransformer3D.from_pretrained(DIR)`,
`ConvViT3D.from_pretrained(DIR)`, or give it to `Finetune.main_finetune --init DIR`. Details: docs/checkpoints.md.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.cli import parse, run_program
from common.config import group, setting, to_dict
from common.errors import InputError
from common.files import digest, file_sha256, naming_errors, sync
from common.runlog import print_main
from common.training.record import RUN_FILE
from Finetune.contract import AXES, recorded_preprocessing
from Finetune.converters import NotConvertible
from Finetune.encoder_file import EncoderFile, read_encoder_file
from Finetune.export_formats import SOURCES, TARGETS
from Finetune.heads import Triple
from Finetune.model_card import readme
from Finetune.predict import code_version
from Finetune.pretrained import CARD, FORMAT, FORMAT_VERSION, WEIGHTS, State


@dataclass(kw_only=True)
class MonaiSettings:
    """Settings of an export for MONAI's ViT."""

    class_token: bool = setting(False, "keep the CLS token, for ViT(classification=True); its head returns the token")


@dataclass(kw_only=True)
class ExportSettings:
    """Settings of an export."""

    checkpoint: Path = setting(help="checkpoint or exported folder; the word CHECKPOINT without a flag is the same")
    to: Path = setting(help="folder to write")
    key: str = setting("auto", "where the weights are in the file, e.g. student, teacher; auto: as in fine-tuning")
    source: Literal["own", *SOURCES] = setting("own", "whose names the weights have in the file")
    num_heads: int | None = setting(None, "attention heads; none: as recorded, else as usual for the width", least=1)
    grid: Triple | None = setting(None, "patch grid of the file's position table; none: as recorded, else a cube")
    format: Literal["encoder", *TARGETS] = setting("encoder", "what to write; monai_*: weights for MONAI's classes")
    licence: str = setting("not stated", "licence of the weights, e.g. cc-by-4.0")
    overwrite: bool = setting(False, "replace --to if it is an export")
    monai_vit: MonaiSettings = group(MonaiSettings, "MONAI's ViT", format="monai_vit")


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--checkpoint", *words]
    config = parse(ExportSettings, words, description=__doc__)
    check_target(config)
    source = read_encoder_file(config.checkpoint, config.key, config.source, config.num_heads, config.grid)
    arguments = source.arguments()
    state = {name: value.detach().contiguous() for name, value in source.build().state_dict().items()}
    card = make_card(config, source, arguments)
    if config.format == "encoder":
        written = state
        write_folder(config.to, state, card)
    elif source.kind != "vit":
        raise InputError(f"{config.checkpoint}: --format {config.format}: found MiM's hybrid encoder, expected a ViT")
    else:
        try:
            more = {"decoder_num_heads": source.args.get("decoder_num_heads")}
            more |= {"keep_class_token": config.monai_vit.class_token}
            other = TARGETS[config.format](source.state | state, arguments, card | more)
        except NotConvertible as error:
            raise InputError(f"{config.checkpoint}: --format {config.format}: {error}") from None
        written = other.state
        card |= {"format": config.format, "architecture": other.architecture, "arguments": other.arguments}
        card |= {"notes": other.notes}
        write_folder(config.to, written, card, other.files)
        for note in other.notes:
            print_main(f"--format {config.format}: {note}")
    count = sum(tensor.numel() for tensor in written.values())
    print_main(f"{config.to}: {card['architecture']}, {len(written)} tensors, {count:,} values")


# ---------------------------------------------------------------- card


def make_card(config: ExportSettings, source: EncoderFile, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return config.json, without the hash of the weights. Arguments of the class stand at its top level."""
    args, path = source.args, config.checkpoint
    if path.is_dir():
        # exported again: the origin stays
        kept = {name: args[name] for name in ("preprocessing", "training", "source", "data")}
    else:
        kept = {
            "preprocessing": preprocessing_card(args, path),
            "training": training_card(args, path),
            "source": {"file": path.name, "sha256": file_sha256(path), "key": config.key, "names": config.source},
            "data": data_hashes(args),
        }
    data = kept.pop("data")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": source.cls.__name__,
        **arguments,
        "grid_size": list(source.grid),
        "licence": config.licence,
        "exported_at_commit": code_version(),
        **kept,
        # last, as it is long: content hashes of the volumes, for the check of leaks
        "data": data,
    }


def preprocessing_card(args: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the preprocessing contract, None if the checkpoint does not record it."""
    preprocessing = recorded_preprocessing(args, path)
    if preprocessing is None:
        return None
    inputs = args.get("inputs") if isinstance(args.get("inputs"), dict) else {}
    measured = {name: inputs.get(name) for name in ("mean", "std")}
    return AXES | to_dict(preprocessing) | measured


def training_card(args: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what a checkpoint records of its training: method, updates, data, code. Values not recorded are None.

    Lists of volumes are named by the end of their paths only, as the rest tells about the machine.
    """
    config = args["config"] if isinstance(args.get("config"), dict) else args
    preset = args["preset"]["name"] if isinstance(args.get("preset"), dict) else None
    names = [*(config.get("datasets") or []), *(list_name(Path(name)) for name in config.get("datalist") or [])]
    hashes = data_hashes(args)
    cases = args.get("training_cases") if preset else hashes
    return {
        "method": "fine-tuning" if preset else config.get("method"),
        "updates": args.get("step"),
        "volumes_per_update": config.get("batch_size"),
        "data_sets": [preset] if preset else names or None,
        "volumes": None if cases is None else len(cases),
        "volumes_sha256": digest(sorted(hashes), 64) if hashes else None,
        "pretrained_from_sha256": args.get("init_sha256"),
        "code_version": training_code(args, path),
    }


def training_code(args: dict[str, Any], path: Path) -> str | None:
    """Return the commit of the code that trained a checkpoint, None if it is not recorded.

    It is recorded in the checkpoint; for checkpoints of earlier versions it is that of run.json beside it.
    """
    try:
        record = json.loads((path.parent / RUN_FILE).read_bytes())
    except (OSError, ValueError):
        record = None
    machine = record.get("environment") if isinstance(record, dict) else None
    beside = machine.get("code") if isinstance(machine, dict) else None
    found = [args.get("code_version"), beside]
    return next((code for code in found if isinstance(code, str) and code != "unknown"), None)


def list_name(path: Path) -> str:
    """Return the name of a folder, or of a file with its folder."""
    return f"{path.parent.name}/{path.name}" if path.suffix else path.name


def data_hashes(args: dict[str, Any]) -> list[str] | None:
    """Return the content hashes of the volumes of a pretraining run, None if they are not recorded."""
    data = args.get("data")
    return list(data) if isinstance(data, (list, tuple)) else None


# ---------------------------------------------------------------- writing


def check_target(config: ExportSettings) -> None:
    """Raise InputError if the folder to write exists, unless it is an export and --overwrite is given."""
    target = config.to
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_export(target):
        raise InputError(f"--to {target}: exists and is no export, expected another folder")
    if not config.overwrite:
        raise InputError(f"--to {target}: exists, expected another folder or --overwrite")
    if config.checkpoint.resolve() == target.resolve():
        raise InputError(f"--to {target}: is the folder to read, expected another one")


def is_export(folder: Path) -> bool:
    """Return whether a folder was written by this program."""
    try:
        card = json.loads((folder / CARD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("format") in (FORMAT, *TARGETS)


def write_folder(target: Path, state: State, card: dict[str, Any], more: dict[str, bytes] | None = None) -> None:
    """Write an export completely or not at all, and replace `target` with it. InputError if it cannot be written.

    Args:
        card: config.json without the hash of the weights.
        more: further files, name -> content.
    """
    from safetensors.torch import save

    weights = save(state, metadata={"format": "pt"})
    data = {"data": card["data"]}
    card = {name: value for name, value in card.items() if name != "data"}
    card |= {"weights_sha256": hashlib.sha256(weights).hexdigest()} | data
    files = {WEIGHTS: weights, CARD: json.dumps(card, indent=2).encode(), "README.md": readme(card).encode()}
    with naming_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            new = temporary / "new"
            new.mkdir()
            for name, content in (files | (more or {})).items():
                (new / name).write_bytes(content)
                sync(new / name)
            sync(new)
            replace_folder(target, new, temporary / "old")
            sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(target: Path, new: Path, old: Path) -> None:
    """Rename `new` to `target`. What was there becomes `old`, and is put back if this fails."""
    if target.exists():
        target.replace(old)
    try:
        new.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise


if __name__ == "__main__":
    sys.exit(run_program(main))
