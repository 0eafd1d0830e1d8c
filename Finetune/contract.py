"""What an encoder expects of its input, as its checkpoint or exported folder records it, and how a preset differs."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from common import checkpoint
from common.cache.statistics import InputStatistics
from common.config import from_dict, shown
from common.data.preprocessing import Preprocessing, is_hounsfield
from common.errors import InputError
from common.files import file_sha256
from Finetune import pretrained
from Finetune.presets import Preset

# how every volume is oriented before it is preprocessed (common/data/volume_io.py)
AXES = {"orientation": "RAS", "axis_order": "D H W: left to right, back to front, feet to head"}


def recorded_args(path: str | Path) -> dict[str, Any]:
    """Return the settings that a checkpoint records, or the card of an exported folder. {} if there are none.

    Raises:
        InputError: the file cannot be read.
    """
    if Path(path).is_dir():
        try:
            return pretrained.read_card(path)
        except ValueError as error:
            raise InputError(str(error)) from None
    args = checkpoint.load(path, check=False).get("args")
    return args if isinstance(args, dict) else {}


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of a checkpoint, or of the weights in an exported folder."""
    return file_sha256(path / pretrained.WEIGHTS if path.is_dir() else path)


def recorded_preprocessing(args: Mapping[str, Any], where: str | Path) -> Preprocessing | None:
    """Return how the volumes were preprocessed, from `recorded_args`. None if this is not recorded.

    Raises:
        InputError: the recorded values are not valid.
    """
    preset, contract = args.get("preset"), args.get("preprocessing")
    if isinstance(preset, dict):
        return from_dict(preset, Preset, f"{where}: preset").preprocessing
    values = contract if isinstance(contract, dict) else args
    names = {field.name for field in fields(Preprocessing)}
    if "intensity" not in values:
        return None
    return from_dict({name: values[name] for name in names & set(values)}, Preprocessing, f"{where}: preprocessing")


def recorded_inputs(args: Mapping[str, Any], where: str | Path) -> InputStatistics | None:
    """Return mean and standard deviation of the training voxels, from `recorded_args`. None if they are not recorded.

    Raises:
        InputError: the recorded values are not valid.
    """
    # in a checkpoint, and in the card of an exported folder
    values = next((v for v in (args.get("inputs"), args.get("preprocessing")) if isinstance(v, dict)), {})
    found = {name: value for name in ("mean", "std") if (value := values.get(name)) is not None}
    return from_dict(found, InputStatistics, f"{where}: inputs") if len(found) == 2 else None


def differences(recorded: Preprocessing, wanted: Preprocessing) -> Iterator[str]:
    """Yield a phrase for each way in which voxels of `wanted` are not what `recorded` made of the same volume.

    Cropping to the foreground is left out, as it changes no voxel.
    """
    pairs = {
        "spacing": [_spacing(p) for p in (recorded, wanted)],
        "intensities": [_intensities(p) for p in (recorded, wanted)],
        "channels": [str(p.channels) for p in (recorded, wanted)],
    }
    # the setting has a meaning for windows alone
    if recorded.intensity == wanted.intensity == "window":
        pairs["modality"] = [p.modality for p in (recorded, wanted)]
    for name, (found, here) in pairs.items():
        if found != here:
            yield f"{name} {found}, here {here}"


def _spacing(preprocessing: Preprocessing) -> str:
    return "as scanned" if preprocessing.spacing is None else f"{shown(preprocessing.spacing)} mm"


def _intensities(preprocessing: Preprocessing) -> str:
    if preprocessing.intensity == "zscore":
        return "zscore"
    low, high = preprocessing.low, preprocessing.high
    unit = "percent" if preprocessing.intensity == "percentiles" else "HU" if is_hounsfield(low, high) else ""
    return f"{preprocessing.intensity} {low:g}..{high:g} {unit}".rstrip()


def voxel_differences(recorded: InputStatistics, found: InputStatistics) -> Iterator[str]:
    """Yield a phrase if the voxels of a data set are far from those that an encoder was trained on: the mean by
    more than a standard deviation, or that by a factor of 2, in some channel (our choice). Data sets with different
    numbers of channels are not compared."""
    if len(recorded.mean) != len(found.mean):
        return
    for channel, (mean, std, here, spread) in enumerate(zip(recorded.mean, recorded.std, found.mean, found.std)):
        if abs(here - mean) > std or not std / 2 <= spread <= 2 * std:
            of = f" of channel {channel}" if len(found.mean) > 1 else ""
            numbers = f"{mean:.2f} and {std:.2f}, here {here:.2f} and {spread:.2f}"
            yield f"mean and standard deviation of the voxels{of} {numbers}"


def contract_warning(path: str | Path, preset: Preset, inputs: InputStatistics | None = None) -> str:
    """Return one line that names each way in which a preset differs from what an encoder was trained on, else "".

    Args:
        inputs: of the preprocessed training volumes; None: not compared.
    """
    args = recorded_args(path)
    recorded, measured = recorded_preprocessing(args, path), recorded_inputs(args, path)
    found = list(differences(recorded, preset.preprocessing)) if recorded else []
    card = args.get("preprocessing")
    # written by others: volumes are oriented in one way here
    orientation = card.get("orientation") if isinstance(card, dict) else None
    if orientation and orientation != AXES["orientation"]:
        found.append(f"orientation {orientation}, here {AXES['orientation']}")
    # where intensities are scaled in another way, the numbers must differ
    if measured and inputs and recorded and _intensities(recorded) == _intensities(preset.preprocessing):
        found += voxel_differences(measured, inputs)
    return f"{path}: was trained on other inputs than those of preset {preset.name}: {'; '.join(found)}" * bool(found)
