"""The transformer blocks against timm's and torch's, and what they keep for the backward pass."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from Finetune.vit_blocks import Block, CrossBlock


def pair(drop_path=0.0):
    """timm's block and ours with the same weights."""
    torch.manual_seed(0)
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    theirs, ours = (
        TimmBlock(24, 4, qkv_bias=True, norm_layer=norm_layer, drop_path=drop_path),
        Block(24, 4, 4.0, True, drop_path),
    )
    with torch.no_grad():
        # neither gains of 1 nor biases of 0
        for parameter in theirs.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(block, x, *args, rows=slice(None)):
    """The output of a block, and the gradients at its input and its parameters."""
    x = x.clone().requires_grad_()
    out = block(x, *args)[:, rows]
    out.float().square().sum().backward()
    return out, x.grad, *(p.grad for p in block.parameters())


def kept(block, x):
    """Numbers per token and channel that a block keeps for the backward pass, besides its weights."""
    weights, storages = {p.data_ptr() for p in block.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    return sum(storages.values()) / out.nbytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_block_is_timms_in_values_and_gradients(dtype):
    theirs, ours = pair()
    x = torch.randn(2, 5, 24)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        expected, found = gradients(theirs, x), gradients(ours, x)
    # LayerNorm is in float32, as on CUDA, where timm's on a CPU is in bfloat16
    tolerance = {} if dtype is None else dict(rtol=0.05, atol=0.5)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, check_dtype=False, **tolerance)
    assert all(grad.dtype == torch.float32 for grad in found[1:])


def test_stochastic_depth_is_timms():
    theirs, ours = pair(drop_path=0.5)
    x, outs = torch.randn(8, 5, 24), []
    for block in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        outs.append(block(x))
    torch.testing.assert_close(outs[1], outs[0])
    assert not torch.equal(outs[1], ours.eval()(x))


@pytest.mark.parametrize("rows", [slice(1), slice(2, None), slice(5, None)])
def test_wanted_rows_are_those_of_the_whole_block(rows):
    theirs, ours = (block.double() for block in pair())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for a, b in zip(gradients(theirs, x, rows=rows), gradients(ours, x, rows), strict=True):
        torch.testing.assert_close(b, a)


def test_frozen_parameters_get_no_gradient():
    theirs, ours = pair()
    for block in (theirs, ours):
        block.mlp.requires_grad_(False)
        block.norm1.requires_grad_(False)
    x = torch.randn(2, 5, 24)
    for a, b in zip(gradients(theirs, x), gradients(ours, x), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_norms_and_gelu_are_not_kept():
    theirs, ours = pair()
    x = torch.randn(2, 50, 24, requires_grad=True)
    assert kept(theirs, x) > 15.9 and kept(ours, x) < 10.4


def test_cross_block_is_torchs_attention():
    torch.manual_seed(0)
    block, x, context = CrossBlock(24, 4), torch.randn(2, 3, 24), torch.randn(2, 7, 24)
    reference = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([block.attn.q.weight, block.attn.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([block.attn.q.bias, block.attn.kv.bias]))
        reference.out_proj.load_state_dict(block.attn.proj.state_dict())
    after = x + reference(block.norm1(x), context, context)[0]
    torch.testing.assert_close(block(x, context), after + block.mlp(block.norm2(after)))
