"""Logits to ids."""

import torch

from Finetune.inference.label_map import label_map
from Finetune.presets import load_preset


def test_nested_regions_become_ids():
    brain = load_preset("MSD01_BrainTumour")
    # channels: core {2,3}, whole {1,2,3}, enhancing {3}
    logits = torch.full((3, 1, 1, 5), -1.0)
    logits[1, ..., 1:4] = 1
    logits[0, ..., 2:4] = 1
    logits[2, ..., 3:5] = 1
    assert label_map(logits, brain).flatten().tolist() == [0, 1, 2, 3, 3]
