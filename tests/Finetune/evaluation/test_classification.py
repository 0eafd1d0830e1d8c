"""AUC against the share of ordered pairs."""

import numpy as np
import pytest
import torch

from Finetune.evaluation.classification import class_scores
from Finetune.presets import load_preset


def test_auc_is_the_share_of_ordered_pairs():
    preset = load_preset("CC_CCII")
    torch.manual_seed(0)
    probabilities, targets = torch.rand(40, 3).softmax(dim=1), torch.randint(0, 3, (40,))
    scores = class_scores(probabilities, targets, preset)
    for number, name in preset.labels.items():
        positive, negative = probabilities[targets == number, number], probabilities[targets != number, number]
        pairs = (positive[:, None] > negative[None]).float().mean()
        assert scores[f"auc {name}"] == pytest.approx(float(pairs), abs=1e-6)
    assert scores["auc"] == pytest.approx(np.mean([scores[f"auc {name}"] for name in preset.labels.values()]))
    # no case is normal
    assert "auc normal" not in class_scores(probabilities, targets.clamp(min=1), preset)
