"""A labelled dataset, and label maps for the tests of scores."""

import numpy as np
import pytest

from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset, volume
from tests.Finetune.scoring import save


@pytest.fixture(scope="module")
def spleen(tmp_path_factory):
    return make_dataset(load_preset("MSD09_Spleen"), tmp_path_factory.mktemp("spleen"))


@pytest.fixture
def two_cases(tmp_path):
    """Two BTCV cases. The second has no kidneys; its prediction misses the spleen and has a false positive kidney."""
    for number, name in enumerate(("0035", "0036")):
        _, label = volume(load_preset("BTCV"), number)
        prediction = np.roll(label, 1, axis=1)
        if number:
            label[(label == 2) | (label == 3)] = 0
            prediction[(prediction == 1) | (prediction == 3)] = 0
        save(tmp_path / f"label/label{name}.nii.gz", label)
        save(tmp_path / f"p/img{name}.nii.gz", prediction)
    return tmp_path
