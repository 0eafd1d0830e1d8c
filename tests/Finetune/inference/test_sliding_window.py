"""Slabs against MONAI's SlidingWindowInferer."""

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from Finetune.inference.sliding_window import Window, slabs, window_starts


def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 3, 3, padding=1)
    )
    return layers.eval().requires_grad_(False)


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(41, 30, 23), (16, 16, 16), (9, 40, 11), (50, 7, 16)])
def test_labels_and_logits_equal_monai(shape, overlap, blending):
    model, image = network(), torch.randn(2, *shape)
    window = Window((16, 16, 16), overlap, blending, batch=3)
    expected = SlidingWindowInferer(window.roi, sw_batch_size=3, overlap=overlap, mode=blending)(image[None], model)[0]
    found = torch.cat([logits for _, logits in slabs(image, model, window)], dim=1)
    assert torch.equal(found.argmax(0), expected.argmax(0))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_slabs_are_contiguous_and_small():
    image, window, ticks = torch.randn(2, 90, 20, 20), Window((16, 16, 16)), []
    parts = list(slabs(image, network(), window, ticks.append))
    rows = 0
    for first, logits in parts:
        assert first == rows
        rows += logits.shape[1]
    assert rows == 90
    assert max(logits.shape[1] for _, logits in parts) <= 16
    assert sum(ticks) == len(window_starts((90, 20, 20), window))
