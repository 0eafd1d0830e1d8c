"""Transformer blocks that keep less for the backward pass than timm's, and compute only the rows that are wanted.

    B batch   T tokens   R wanted rows   H hidden width   C width

What is cheap to compute again is not kept: the outputs of LayerNorm and GELU. Of the 16 C numbers per token that timm's
block keeps, 10 C remain. Values and gradients are those of timm's `Block`, and so are the parameters' names.

Needs torch and timm, nothing else of this repository.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-6
ALL = slice(None)


# ---------------------------------------------------------------- layers that keep their input alone


class NormLinear(torch.autograd.Function):
    """`linear(layer_norm(x))`, which keeps x and normalises it again in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, gain, shift, weight)
        return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS).to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight = ctx.saved_tensors
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain, shift, EPS)
        grad_weight, grad_bias = linear_gradients(grad, normed.to(weight.dtype), ctx.needs_input_grad[3:])
        del normed
        wanted = list(ctx.needs_input_grad[:3])
        if not any(wanted):
            return None, None, None, grad_weight, grad_bias
        grad = (grad @ weight).to(x.dtype)
        grads = torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, gain, shift, wanted)
        return *grads, grad_weight, grad_bias


class GeluLinear(torch.autograd.Function):
    """`linear(gelu(x))`, which keeps x and applies GELU again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = linear_gradients(grad, F.gelu(x), ctx.needs_input_grad[1:])
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias


def linear_gradients(grad: Tensor, x: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a linear layer's weight and bias: `grad` is its output's (..., O), x its input."""
    grad = grad.flatten(0, -2)
    return grad.T @ x.flatten(0, -2) if wanted[0] else None, grad.sum(dim=0) if wanted[1] else None


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `linear(norm(x))`: (..., C) -> (..., O), in the dtype of autocast."""
    if not recomputes(x):
        return F.linear(norm(x), weight, bias)
    dtype = linear_dtype(x)
    bias = bias if bias is None else bias.to(dtype)
    return NormLinear.apply(x.to(norm.weight.dtype), norm.weight, norm.bias, weight.to(dtype), bias)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """Return `linear(gelu(x))`: (..., H) -> (..., C), in the dtype of autocast."""
    if not recomputes(x):
        return linear(F.gelu(x))
    dtype = linear_dtype(x)
    return GeluLinear.apply(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype))


def recomputes(x: Tensor) -> bool:
    """Return whether there is a backward pass to save memory for. torch.compile chooses itself what it keeps."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast computes a linear layer; without autocast that of x."""
    device = x.device.type
    # the meta device has no autocast, and raises when asked
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else x.dtype


# ---------------------------------------------------------------- blocks


class Block(TimmBlock):
    """timm's pre-norm block: LayerNorm (eps 1e-6), self-attention, LayerNorm, MLP with GELU.

    Args:
        drop_path: probability that a sample skips a branch (stochastic depth).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path: float = 0.0):
        norm_layer = partial(nn.LayerNorm, eps=EPS)
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer, drop_path=drop_path)

    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        """Return the rows `rows` of the block's output: (B, T, C) -> (B, R, C). They attend to all T tokens."""
        qkv = norm_linear(x, self.norm1, self.attn.qkv.weight, self.attn.qkv.bias)  # (B, T, 3C)
        q, k, v = qkv.unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads)
        x = x[:, rows] + self.drop_path1(self.attn.proj(attention(q[:, :, rows], k, v)))
        return x + self.drop_path2(self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return gelu_linear(norm_linear(x, self.norm2, self.mlp.fc1.weight, self.mlp.fc1.bias), self.mlp.fc2)


class CrossAttention(nn.Module):
    """The layers of attention between queries (B, R, C) and other tokens (B, T, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)


class CrossBlock(Block):
    """A pre-norm block whose queries attend to other tokens, and not to each other."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias)
        self.attn = CrossAttention(dim, num_heads, qkv_bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the queries (B, R, C) after attention to `context` (B, T, C) and the MLP."""
        q = norm_linear(x, self.norm1, self.attn.q.weight, self.attn.q.bias)  # (B, R, C)
        q = q.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
        k, v = self.attn.kv(context).unflatten(-1, (2, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.proj(attention(q, k, v))
        return x + self.feed_forward(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of queries (B, heads, R, c) to keys and values (B, heads, T, c), as (B, R, heads * c)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
