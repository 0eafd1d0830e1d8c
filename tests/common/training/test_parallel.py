"""Compilation and DDP change how fast it goes, not what comes out."""

import pytest
import torch
from torch import nn

from common.distributed import Run
from common.training.parallel import PrecisionSettings, compile_blocks, set_cuda_options, wrap
from Finetune.models_3dvit import VisionTransformer3D


def vit():
    torch.manual_seed(0)
    return VisionTransformer3D(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_tokens_and_gradients():
    plain, compiled = vit(), vit()
    assert compile_blocks(compiled) == 2 and list(plain.state_dict()) == list(compiled.state_dict())
    for size in (16, 32):  # another number of tokens
        x = torch.rand(2, 1, size, size, size)
        for model in (plain, compiled):
            model.zero_grad()
            model(x).square().sum().backward()
        torch.testing.assert_close(plain(x), compiled(x), atol=1e-5, rtol=1e-5)
        for a, b in zip(plain.parameters(), compiled.parameters()):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_one_process_needs_no_wrapping():
    method = nn.Linear(2, 2)
    assert wrap(method, Run(torch.device("cpu"))) is method


def test_tf32_and_autotuning_are_off_unless_asked_for():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        set_cuda_options(PrecisionSettings(tf32=True, cudnn_benchmark=True))
        assert matmul.allow_tf32 and cudnn.allow_tf32 and cudnn.benchmark
        set_cuda_options(PrecisionSettings())
        assert not (matmul.allow_tf32 or cudnn.allow_tf32 or cudnn.benchmark)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
