"""Pictures of what an autoencoder reconstructs: the view, what it was shown of it, and what it made of that."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from Finetune.models_3dvit import VisionTransformer3D, grid_of
from Pretrain.losses import patchify, unpatchify
from Pretrain.models_mae import encode_visible, reconstruct

PANELS = ("view", "visible", "reconstruction")


@torch.no_grad()
def reconstruction_volumes(
    vit: VisionTransformer3D, x: Tensor, keys: Tensor, mask_ratio: float, norm_pix_loss: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The view x (M, C, D, H, W), the view with its removed patches at 0, and the view with its removed patches predicted.

    With `norm_pix_loss` a prediction has no absolute scale: it is shown with the mean and spread of the true patch.
    """
    grid = grid_of(x.shape[2:], vit.patch_size)
    visible = encode_visible(vit, x, keys, mask_ratio)
    _, prediction = reconstruct(vit, x, visible, norm_pix_loss)
    patches, removed = patchify(x, vit.patch_size), visible.mask.unsqueeze(-1)
    if norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        prediction = prediction.float() * (variance + 1e-6).sqrt() + mean
    shown = unpatchify(patches * (1 - removed), vit.patch_size, grid)
    filled = unpatchify(patches * (1 - removed) + prediction * removed, vit.patch_size, grid)
    return x, shown, filled


def picture(rows: dict[str, tuple[Tensor, Tensor, Tensor]], zoom: int = 3) -> np.ndarray:
    """One row of three panels per name, axial middle slices (front up, the patient's right on the left): (H, W, 3) uint8.

    `rows`: name to volumes (C, D, H, W) in [0, 1], the first channel is shown.
    """
    strips = []
    for name, volumes in rows.items():
        slices = [axial(volume[0].clamp(0, 1).cpu().numpy()) for volume in volumes]
        panels = [Image.fromarray((s * 255).astype(np.uint8)).resize((s.shape[1] * zoom, s.shape[0] * zoom), 0) for s in slices]
        strips.append(_strip(name, panels))
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "black")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return np.asarray(canvas)


def axial(volume: np.ndarray) -> np.ndarray:
    """The middle axial slice of a RAS volume (D, H, W) as a radiologist sees it: (rows, columns), front up, right on the left."""
    return np.flip(volume[:, :, volume.shape[2] // 2].T, axis=(0, 1))


def _strip(name: str, panels: list[Image.Image], margin: int = 18) -> Image.Image:
    width = sum(p.width for p in panels) + 4 * (len(panels) - 1)
    strip = Image.new("RGB", (width, panels[0].height + margin), "black")
    draw, left = ImageDraw.Draw(strip), 0
    for title, panel in zip(PANELS, panels):
        draw.text((left + 3, 3), f"{name}: {title}", fill="white")
        strip.paste(panel, (left, margin))
        left += panel.width + 4
    return strip
