"""Logits to ids."""

import numpy as np
import pytest
import torch

from Finetune.inference.label_map import keep_largest_components, label_map, largest_channel
from Finetune.presets import load_preset


def test_nested_regions_become_ids():
    brain = load_preset("MSD01_BrainTumour")
    # channels: core {2,3}, whole {1,2,3}, enhancing {3}
    logits = torch.full((3, 1, 1, 5), -1.0)
    logits[1, ..., 1:4] = 1
    logits[0, ..., 2:4] = 1
    logits[2, ..., 3:5] = 1
    assert label_map(logits, brain).flatten().tolist() == [0, 1, 2, 3, 3]


def test_only_the_largest_component_of_the_given_classes_is_kept():
    labels = np.array([1, 0, 1, 1, 2, 0, 2, 2, 3], np.uint8).reshape(1, 1, 9)
    keep_largest_components(labels, (1, 3))
    assert labels.flatten().tolist() == [0, 0, 1, 1, 2, 0, 2, 2, 3]


def test_all_classes_together_come_before_each():
    # the largest 1 lies apart from the largest component of all classes
    labels = np.array([1, 1, 0, 1, 2, 1, 0, 3], np.uint8).reshape(1, 1, 8)
    keep_largest_components(labels, (2,), foreground=True)
    assert labels.flatten().tolist() == [0, 0, 0, 1, 2, 1, 0, 0]
    keep_largest_components(labels, (1,), foreground=True)
    assert labels.flatten().tolist() == [0, 0, 0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize("channels", [1, 2, 14])
def test_the_largest_channel_is_that_of_argmax(channels):
    # whole numbers, so that many are equal
    logits = torch.randint(-3, 4, (channels, 7, 6, 5)).float()[:, 1:5]
    found = largest_channel(logits)
    assert found.dtype == torch.uint8 and torch.equal(found.long(), logits.argmax(dim=0))
