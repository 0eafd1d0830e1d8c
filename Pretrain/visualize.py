"""Pictures of what an autoencoder reconstructs: the view, what it was shown of it, and what it made of that."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.training.method import Reconstruction
from Finetune.models_3dvit import grid_of
from Pretrain.losses import patchify, unpatchify

PANELS = ("view", "visible", "reconstruction")


def panels(made: Reconstruction, patch_size: Sequence[int], norm_pix_loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The view, then with its removed patches black, then with them predicted; each (M, C, D, H, W).

    With `norm_pix_loss` a prediction has no absolute scale: it is shown with the mean and spread of the true patch.
    """
    view, mask, prediction = made
    grid = grid_of(view.shape[2:], patch_size)
    patches, removed = patchify(view, patch_size), mask.unsqueeze(-1)
    prediction = prediction.float()
    if norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    shown = unpatchify(patches * (1 - removed), patch_size, grid)
    filled = unpatchify(patches * (1 - removed) + prediction * removed, patch_size, grid)
    return view, shown, filled


def picture(
    rows: dict[str, Reconstruction], patch_size: Sequence[int], norm_pix_loss: bool, zoom: int = 3
) -> np.ndarray:
    """A row of three panels per kind of view: axial middle slices, first view and channel, as (H, W, 3) uint8."""
    strips = []
    for name, made in rows.items():
        volumes = panels(Reconstruction(*(t[:1] for t in made)), patch_size, norm_pix_loss)
        slices = [axial(volume[0, 0].cpu().numpy()) for volume in volumes]
        low, high = np.percentile(slices[0], (1, 99))  # the view's own contrast, for all three
        slices = [((s - low) / max(high - low, 1e-6)).clip(0, 1) for s in slices]
        images = [
            Image.fromarray((s * 255).astype(np.uint8)).resize((s.shape[1] * zoom, s.shape[0] * zoom), 0)
            for s in slices
        ]
        strips.append(_strip(name, images))
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "black")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return np.asarray(canvas)


def axial(volume: np.ndarray) -> np.ndarray:
    """The middle axial slice of a RAS volume (D, H, W) as radiologists see it: front up, the right side on the left."""
    return np.flip(volume[:, :, volume.shape[2] // 2].T, axis=(0, 1))


def _strip(name: str, images: list[Image.Image], margin: int = 18) -> Image.Image:
    width = sum(i.width for i in images) + 4 * (len(images) - 1)
    strip = Image.new("RGB", (width, images[0].height + margin), "black")
    draw, left = ImageDraw.Draw(strip), 0
    for title, image in zip(PANELS, images):
        draw.text((left + 3, 3), f"{name}: {title}", fill="white")
        strip.paste(image, (left, margin))
        left += image.width + 4
    return strip
