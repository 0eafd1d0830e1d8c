"""From settings to an architecture: what cannot be built is refused in words, before any data is read."""

import numpy as np
import pytest

from common.errors import InputError
from Finetune.architectures import ModelSettings, dynunet_strides, resolve
from Finetune.inference.sliding_window import Window
from Finetune.presets import load_preset


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"depth": 0}, "depth: found 0, needs at least 1"),
        ({"embed_dim": 0}, "embed_dim: found 0"),
        ({"num_heads": 0}, "num_heads: found 0, needs at least 1"),
        ({"feature_size": -4}, "feature_size: found -4"),
        ({"drop_path": 2.0}, "drop_path: found 2.0"),
        ({"model": "dynunet", "roi": (30, 30, 30)}, r"roi: found \(30, 30, 30\), --model dynunet halves"),
        ({"model": "dynunet", "roi": (7, 7, 7)}, "--model dynunet halves"),
        (
            {"model": "swinunetr", "feature_size": 16},
            "feature_size: found 16, --model swinunetr needs a multiple of 12",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        resolve(ModelSettings(**settings), load_preset("BTCV"), None)


@pytest.mark.parametrize(
    "roi, levels", [((96, 96, 96), 5), ((128, 128, 128), 6), ((192, 192, 32), 6), ((48, 40, 36), 4), ((30, 30, 30), 2)]
)
def test_dynunet_halves_while_an_axis_is_even_and_keeps_four_voxels(roi, levels):
    strides = dynunet_strides(roi)
    smallest = np.array(roi) / np.prod(strides, axis=0)
    assert len(strides) == levels and strides[0] == (1, 1, 1)
    assert (smallest >= 4).all() and (smallest == smallest.round()).all()
    assert len(strides) == 6 or ((smallest < 8) | (smallest % 2 == 1)).all()


@pytest.mark.parametrize("settings, words", [({"overlap": 1.0}, "overlap: found 1.0"), ({"batch": 0}, "sw_batch_size")])
def test_a_window_that_cannot_slide(settings, words):
    with pytest.raises(InputError, match=words):
        Window((32, 32, 32), **settings)
