"""Pictures of what an autoencoder reconstructs: the view, its visible patches, and the prediction."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from common.training.method import Reconstruction
from Finetune.models_3dvit import grid_of
from Pretrain.losses import patchify, undo_norm_pix, unpatchify

PANELS = ("view", "visible", "reconstruction")


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
