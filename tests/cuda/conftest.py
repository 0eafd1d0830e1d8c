"""The device of these tests: CUDA, or what MASK_VOLUMES_CUDA_TESTS_ON names, to run them without a GPU."""

import os

import pytest
import torch


@pytest.fixture
def device(monkeypatch):
    """The device, with full float32 precision. Without a GPU the test is skipped."""
    name = os.environ.get("MASK_VOLUMES_CUDA_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    # TF32 in convolutions, torch's default, differs from the CPU by 1e-3
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(name)
