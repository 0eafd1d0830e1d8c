"""Pictures of a run: what the autoencoder reconstructs, and the measures of learning over the epochs."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from common.training.method import Reconstruction
from Finetune.encoder3d import grid_of
from Pretrain.health import PREFIX
from Pretrain.losses import patchify, undo_norm_pix, unpatchify

PANELS = ("view", "visible", "reconstruction")
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
    rows: dict[str, Reconstruction],
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    zoom: int = 3,
    norm_pix_eps: float = 1e-6,
) -> np.ndarray:
    """Draw three panels per kind of view: axial middle slices, first view and channel, as (H, W, 3) uint8."""
    strips = []
    for name, made in rows.items():
        volumes = panels(Reconstruction(*(t[:1] for t in made)), patch_size, norm_pix_loss, norm_pix_eps)
        slices = np.stack([axial(volume[0, 0].cpu().numpy()) for volume in volumes])  # (3, H, W)
        # the contrast of the view, for all three
        low, high = np.percentile(slices[0], (1, 99))
        pixels = (255 * ((slices - low) / max(high - low, 1e-6)).clip(0, 1)).astype(np.uint8)
        strips.append(_strip(name, pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)))
    width = max(strip.shape[1] for strip in strips)
    gray = np.vstack([np.pad(strip, ((0, 0), (0, width - strip.shape[1]))) for strip in strips])
    return np.stack([gray] * 3, axis=-1)


def axial(volume: np.ndarray) -> np.ndarray:
    """Return the middle axial slice of a RAS volume (D, H, W) as radiologists see it: anterior up, right side left."""
    return np.flip(volume[:, :, volume.shape[2] // 2].T, axis=(0, 1))


def _strip(name: str, slices: np.ndarray, title: int = 18, gap: int = 4) -> np.ndarray:
    """Return slices (3, H, W) side by side under their titles."""
    framed = np.pad(slices, ((0, 0), (title, 0), (0, gap)))
    image = Image.fromarray(np.hstack(framed)[:, :-gap])
    for number, panel in enumerate(PANELS):
        ImageDraw.Draw(image).text((number * framed.shape[2] + 3, 3), f"{name}: {panel}", fill=255)
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
                ax.plot([line["epoch"] for line in lines], [line.get(name, math.nan) for line in lines], label=short)
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
