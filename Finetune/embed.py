"""Write the features of a pretrained encoder for volumes in bulk.

    python -m Finetune.embed --checkpoint exported --images DIR_or_LIST --out DIR

Each volume is preprocessed as the checkpoint records it, padded with zeros at the end of each axis, and encoded in
windows of the encoder's size side by side. NAME.npz (or NAME.safetensors) then holds, in float32:

    cls       (C,)          CLS token, or the mean of the patch tokens of an encoder without one; mean over the windows
    patches   (d, h, w, C)  patch tokens after the final norm, on the patch grid of the volume; patches that are padding
                            only are left out
    affine    (4, 4)        index (d, h, w) of a patch -> RAS coordinates of its centre in mm

A second call continues: it skips volumes that have a file. A volume that cannot be used is reported with one line, the
others are done, and the exit code is 2. Windows and padding are our choice.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import parse, run_program
from common.config import setting, shown, to_dict
from common.data import volume_io
from common.data.datalist import DATA_ROOT_HELP, Case, read_cases
from common.data.preprocessing import Preprocessing
from common.distributed import setup
from common.errors import InputError
from common.files import check_writable, replacing
from common.runlog import print_main, progress
from Finetune.contract import recorded_preprocessing, weights_sha256
from Finetune.encoder3d import Grid, grid_of
from Finetune.encoder_file import EncoderFile, read_encoder_file
from Finetune.evaluation.features import Reader, summary_of, token_reader
from Finetune.evaluation.formats import write_json
from Finetune.presets import load_preset

RECORD = "embed.json"


@dataclass(kw_only=True)
class EmbedSettings:
    """Settings of the features."""

    checkpoint: Path = setting(help="checkpoint or exported folder")
    key: str = setting("auto", "where the weights are in the file, e.g. student, teacher; auto: as in fine-tuning")
    images: Path = setting(help="folder of NIfTI files or DICOM series, a text file of paths, or a Decathlon JSON")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    out: Path = setting(help="folder for the features, one file per volume")
    format: Literal["npz", "safetensors"] = "npz"
    roi: Grid | None = setting(None, "voxels of a window; none: the size that the encoder was trained with", least=1)
    preset: str | None = setting(None, "preprocess as this preset does; none: as the checkpoint records")
    batch: int = setting(4, "windows per forward pass", least=1)
    amp: Literal["auto", "bf16", "fp16", "off"] = setting("auto", "autocast; auto: bf16 on CUDA, off on a CPU")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA if available")


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    config = parse(EmbedSettings, argv, description=__doc__)
    file = read_encoder_file(config.checkpoint, config.key)
    encoder, preprocessing = file.build(), choose_preprocessing(config, file)
    roi = tuple(config.roi or encoder.img_size)
    try:
        grid_of(roi, encoder.patch_size)
    except ValueError:
        raise InputError(
            f"--roi {shown(roi)}: must be divisible by the patch size {shown(encoder.patch_size)}"
        ) from None
    cases = read_cases(config.images, config.data_root)
    check_writable(config.out)
    check_record(config, {"roi": list(roi), "preprocessing": to_dict(preprocessing)})
    read = token_reader(encoder, setup(config.device).device, config.amp)
    failed, skipped = [], 0
    for case in progress(cases, desc="embed", unit="volume"):
        target = config.out / f"{case.name}.{config.format}"
        if target.exists():
            skipped += 1
            continue
        try:
            arrays = embed_case(
                case, preprocessing, read, encoder.patch_size, roi, encoder.num_prefix_tokens, config.batch
            )
            write_arrays(target, arrays)
        except InputError as error:
            failed.append(case.name)
            print_main(f"error: {error}")
    done = len(cases) - len(failed)
    print_main(f"{done} of {len(cases)} volumes in {config.out}, {skipped} of them from an earlier call")
    if failed:
        raise InputError(f"{len(failed)} of {len(cases)} volumes have no features: {', '.join(failed)}")


def choose_preprocessing(config: EmbedSettings, file: EncoderFile) -> Preprocessing:
    """Return how volumes are preprocessed. InputError if this is not known, or has other channels than the encoder."""
    found = load_preset(config.preset).preprocessing if config.preset else recorded_preprocessing(file.args, file.path)
    if found is None:
        raise InputError(f"{file.path}: does not record how its volumes were preprocessed, expected --preset")
    channels = file.arguments()["in_chans"]
    if found.channels != channels:
        raise InputError(f"{file.path}: found an encoder of {channels} channel(s), expected {found.channels}")
    return found


def check_record(config: EmbedSettings, used: dict[str, Any]) -> None:
    """Write what determines the features to embed.json. InputError if the folder has features of other settings."""
    path = config.out / RECORD
    record = {"weights_sha256": weights_sha256(config.checkpoint), "key": config.key, **used}
    if path.exists():
        try:
            earlier = json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise InputError(f"{path}: cannot be read, expected the record of an earlier call") from None
        changed = [name for name in record if not isinstance(earlier, dict) or earlier.get(name) != record[name]]
        if changed:
            raise InputError(
                f"--out {config.out}: has features of another {', '.join(changed)}, expected another folder"
            )
    write_json(path, record)


# ---------------------------------------------------------------- one volume


def embed_case(
    case: Case, preprocessing: Preprocessing, read: Reader, patch: Grid, roi: Grid, prefix: int, batch: int
) -> dict[str, np.ndarray]:
    """Return the arrays of a volume, as the module describes them.

    Raises:
        InputError: the volume cannot be used, or its features are not finite.
    """
    if case.problem:
        raise InputError(case.problem)
    image, _ = preprocessing.apply(volume_io.read_image(case.image, channels=preprocessing.channels), overwrite=True)
    cls, patches = volume_features(torch.as_tensor(image.as_tensor()), read, patch, roi, prefix, batch)
    if not bool(torch.isfinite(patches).all()):
        raise InputError(f"{case.image}: its features are not finite: --amp may be too narrow (try off)")
    affine = patch_affine(np.asarray(image.affine, np.float64), patch)
    return {"cls": cls.numpy(), "patches": patches.numpy(), "affine": affine}


def volume_features(
    volume: Tensor, read: Reader, patch: Grid, roi: Grid, prefix: int = 1, batch: int = 4
) -> tuple[Tensor, Tensor]:
    """Return the CLS token (C,) and the patch tokens (d, h, w, C) of a preprocessed volume (channels, D, H, W).

    Args:
        read: from `token_reader`.
        patch, roi: voxels of a patch and of a window.
        prefix: prefix tokens of the encoder, 1 with a CLS token.
    """
    shape = volume.shape[1:]
    counts = [-(-size // r) for size, r in zip(shape, roi)]
    padding = [n * r - size for n, r, size in zip(counts, roi, shape)]
    padded = F.pad(volume, [side for extra in padding[::-1] for side in (0, extra)])
    windows = (
        padded.unflatten(3, (counts[2], roi[2])).unflatten(2, (counts[1], roi[1])).unflatten(1, (counts[0], roi[0]))
    )
    # (channels, nd, rd, nh, rh, nw, rw) -> (windows, channels, rd, rh, rw)
    windows = windows.permute(1, 3, 5, 0, 2, 4, 6).flatten(0, 2)
    tokens = torch.cat([read(part).cpu() for part in windows.split(batch)])  # (windows, P+n, C)
    inner = grid_of(roi, patch)
    patches = tokens[:, prefix:].reshape(*counts, *inner, -1).permute(0, 3, 1, 4, 2, 5, 6)
    patches = patches.reshape(*(n * g for n, g in zip(counts, inner)), -1)  # (d, h, w, C), with padding
    inside = tuple(slice(-(-size // p)) for size, p in zip(shape, patch))
    return summary_of(tokens, prefix).mean(dim=0), patches[inside].contiguous()


def patch_affine(affine: np.ndarray, patch: Grid) -> np.ndarray:
    """Return the affine (4, 4) from patch index to the mm of patch centres, float32, from that of the voxels."""
    size = np.asarray(patch, np.float64)
    to_voxels = np.diag([*size, 1.0])
    to_voxels[:3, 3] = (size - 1) / 2
    return (affine @ to_voxels).astype(np.float32)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as .npz or .safetensors, by the ending of the path, completely or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".npz":
            np.savez(file, **arrays)
        else:
            from safetensors.numpy import save

            file.write(save(arrays))


if __name__ == "__main__":
    sys.exit(run_program(main))
