"""Pictures of a run: what the autoencoder reconstructs, and the measures of learning over the epochs."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from common.training.method import Reconstruction
from Finetune.encoder3d import grid_of
from Pretrain.health import PREFIX
from Pretrain.losses import patchify, undo_norm_pix, unpatchify

PANELS = ("visible", "reconstruction")
# the axis across which each plane of a RAS volume (D, H, W) lies
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
ERROR_COLOURS = colormaps["inferno"]
# title and lines of each curve over epochs; a line is drawn when the log has it
CURVES = {
    "PSNR above the patch mean, dB": ("over_mean",),
    "PSNR above position alone, dB": ("over_position",),
    "shares after the norm": ("norm/constant", "norm/position", "norm/volume", "norm/content"),
    "losses": ("rec_", "global_global", "global_local", "align_", "chance_"),
    "monitors, update": ("monitor/entropy", "monitor/kl"),
}


# ---------------------------------------------------------------- reconstructions


def panels(
    made: Reconstruction, patch_size: Sequence[int], norm_pix_loss: bool, norm_pix_eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the view, the view with removed patches black, and the view with them predicted; each (M, C, D, H, W).

    With `norm_pix_loss` a prediction has no absolute scale: it is shown with the mean and spread of the true patch.
    """
    view, mask, prediction = made
    grid = grid_of(view.shape[2:], patch_size)
    patches, removed = patchify(view, patch_size), mask.unsqueeze(-1)
    prediction = prediction.float()
    if norm_pix_loss:
        prediction = undo_norm_pix(prediction, patches, norm_pix_eps)
    shown = unpatchify(patches * (1 - removed), patch_size, grid)
    filled = unpatchify(patches * (1 - removed) + prediction * removed, patch_size, grid)
    return view, shown, filled


def picture(
    rows: Mapping[str, Reconstruction],
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    norm_pix_eps: float = 1e-6,
    width: int = 192,
) -> np.ndarray:
    """Draw, as (H, W, 3) uint8, the first view of each kind in its three middle planes: the view, what is visible, the
    reconstruction, and its absolute error.

    Args:
        width: pixels of a panel; the view is enlarged to it by a whole factor.
    """
    strips = []
    for name, made in rows.items():
        shown = panels(Reconstruction(*(t[:1] for t in made)), patch_size, norm_pix_loss, norm_pix_eps)
        volumes = np.stack([volume[0, 0].float().cpu().numpy() for volume in shown])  # (3, D, H, W)
        low, high = np.percentile(volumes[0], (1, 99))
        contrast = max(high - low, 1e-6)
        zoom = max(1, width // max(volumes.shape[1:]))
        for plane, axis in PLANES.items():
            slices = np.stack([middle(volume, axis) for volume in volumes])  # (3, H, W)
            gray = (255 * ((slices - low) / contrast).clip(0, 1)).astype(np.uint8)[..., None].repeat(3, axis=-1)
            # the full range of colours is half of the contrast
            error = 2 * np.abs(slices[2] - slices[0]) / contrast
            coloured = (255 * ERROR_COLOURS(error.clip(0, 1))[..., :3]).astype(np.uint8)
            drawn = np.concatenate([gray, coloured[None]]).repeat(zoom, axis=1).repeat(zoom, axis=2)
            strips.append(_strip(f"{name} {plane}", drawn, f"error 0..{contrast / 2:.2f}"))
    extent = max(strip.shape[1] for strip in strips)
    return np.vstack([np.pad(strip, ((0, 0), (0, extent - strip.shape[1]), (0, 0))) for strip in strips])


def middle(volume: np.ndarray, axis: int) -> np.ndarray:
    """Return the middle slice across an axis of a RAS volume (D, H, W) as radiologists see it: anterior or superior up,
    the patient's right on the left, in the sagittal plane anterior on the left."""
    return np.flip(volume.take(volume.shape[axis] // 2, axis).T, axis=(0, 1))


def _strip(name: str, slices: np.ndarray, error: str, title: int = 18, gap: int = 4) -> np.ndarray:
    """Return slices (4, H, W, 3) side by side under their titles; `error` is that of the last."""
    framed = np.pad(slices, ((0, 0), (title, 0), (0, gap), (0, 0)))
    image = Image.fromarray(np.hstack(framed)[:, :-gap])
    for number, text in enumerate((name, *PANELS, error)):
        ImageDraw.Draw(image).text((number * framed.shape[2] + 3, 3), text, fill=(255, 255, 255))
    return np.asarray(image)


# ---------------------------------------------------------------- measures of learning


def curves(lines: Sequence[Mapping[str, float]]) -> bytes:
    """Return a PNG of the measures over the epochs, and per block in the last one."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for ax, (title, wanted) in zip(axes, CURVES.items()):
        for name in lines[-1]:
            short = name.removeprefix(PREFIX)
            is_monitor = title.startswith("monitors")
            if is_monitor != name.startswith(PREFIX) and any(_matches(short, word) for word in wanted):
                values = [line.get(name, math.nan) for line in lines]
                # with dots, or a single measurement would not be seen
                ax.plot([line["epoch"] for line in lines], values, ".-", label=short)
        _finish(ax, title, "epoch")
    for ax, measure in zip(axes[len(CURVES) :], ("participation_ratio", "power", "content")):
        stages = [name for name in lines[-1] if name.startswith(PREFIX) and name.endswith(f"/{measure}")]
        for line, label in ((lines[0], "first"), (lines[-1], "last")):
            ax.plot([line.get(name, math.nan) for name in stages], label=label)
        ax.set_xticks(range(len(stages)), [name.split("/")[1].replace("block", "") for name in stages], fontsize=6)
        _finish(ax, f"{measure.replace('_', ' ')} per block", "")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=70)
    return content.getvalue()


def _matches(name: str, word: str) -> bool:
    return name.startswith(word) or name.endswith(f"/{word}")


def _finish(ax, title: str, xlabel: str) -> None:
    ax.set_title(title, fontsize=8)
    ax.set_xlabel(xlabel, fontsize=7)
    ax.tick_params(labelsize=6)
    if ax.lines:
        ax.legend(fontsize=6)
