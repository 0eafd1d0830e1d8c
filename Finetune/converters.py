"""Convert the weights of a ViT between this repository's names and those of other libraries.

    to_X(state, ...) -> state      this repository's names -> X's
    from_X(state) -> state         X's names -> this repository's

`state` maps names to tensors and is not changed. All functions are for 3D ViTs; MiM's hybrid has no counterpart in
these libraries. Arithmetic differs in one point: MONAI's LayerNorm adds 1e-5 to the variance, ours (and MAE's) 1e-6.
`match_norm_eps` sets ours in a MONAI network, and outputs are then equal up to the rounding of another order of sums.
Without it they differ by about 1e-5 of their size.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from Finetune.pretrained import State, clean_keys

NORM_EPS = 1e-6
# ours -> MONAI's, the start of a name or all of it
BLOCK = {"attn.proj.": "attn.out_proj.", "mlp.fc1.": "mlp.linear1.", "mlp.fc2.": "mlp.linear2."}
# parts of a block that have the same name
SAME = ("attn.qkv.", "norm1.", "norm2.")


class NotConvertible(ValueError):
    """The weights cannot be written under the other names without changing what they compute."""


def match_norm_eps(model: nn.Module, eps: float = NORM_EPS) -> nn.Module:
    """Set what all LayerNorms of a network add to the variance, and return the network."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model


# ---------------------------------------------------------------- blocks


def _to_monai_blocks(state: State, name: str) -> State:
    """Return the blocks called `name`.N under MONAI's names.

    MONAI's blocks also have a norm for cross-attention that is not used here; it gets its initial values.
    """
    found: State = {}
    for key, value in state.items():
        if match := re.fullmatch(rf"({name}\.\d+)\.(.+)", key):
            block, part = match.groups()
            for ours, theirs in BLOCK.items():
                part = part.replace(ours, theirs) if part.startswith(ours) else part
            found[f"{block}.{part}"] = value
            if part == "norm1.weight":
                found[f"{block}.norm_cross_attn.weight"] = torch.ones_like(value)
                found[f"{block}.norm_cross_attn.bias"] = torch.zeros_like(value)
    return found


def _from_monai_blocks(state: State, name: str) -> State:
    """Return MONAI's blocks called `name`.N under our names. A query-key-value layer without bias gets one of zeros."""
    found: State = {}
    for key, value in state.items():
        if match := re.fullmatch(rf"({name}\.\d+)\.(.+)", key):
            block, part = match.groups()
            for ours, theirs in BLOCK.items():
                part = part.replace(theirs, ours) if part.startswith(theirs) else part
            if part.startswith((*BLOCK, *SAME)):
                found[f"{block}.{part}"] = value
            if part == "attn.qkv.weight":
                found.setdefault(f"{block}.attn.qkv.bias", value.new_zeros(len(value)))
    return found


def depth_of(state: State, name: str) -> int:
    """Return the number of blocks called `name`.N."""
    return 1 + max((int(m[1]) for key in state if (m := re.match(rf"{name}\.(\d+)\.", key))), default=-1)


def _split_table(state: State, name: str = "pos_embed") -> tuple[Tensor | None, Tensor]:
    """Return the CLS row (1, 1, C) of a position table, None without a CLS token, and its patch rows (1, N, C)."""
    table = state[name]
    return (table[:, :1], table[:, 1:]) if "cls_token" in state else (None, table)


def _positioned_cls_token(state: State) -> Tensor:
    """Return the CLS token with its position, as other libraries have no position for it."""
    row, _ = _split_table(state)
    return state["cls_token"] if row is None else state["cls_token"] + row


def _with_table(state: State, patches: Tensor) -> State:
    """Add the position table, with a row of zeros for a CLS token."""
    zeros = patches.new_zeros(1, int("cls_token" in state), patches.shape[2])
    return state | {"pos_embed": torch.cat([zeros, patches], dim=1)}


# ---------------------------------------------------------------- MONAI ViT


def to_monai_vit(state: State, class_token: bool = False) -> State:
    """Return the weights for `monai.networks.nets.ViT(..., qkv_bias=True, pos_embed_type="learnable")`.

    Args:
        class_token: for `ViT(classification=True)`: with the CLS token, its position added. Otherwise the token is left
            out, as in fine-tuning with UNETR, and outputs are those of our ViT with `class_token=False`.
    """
    _, patches = _split_table(state)
    found = {f"patch_embedding.patch_embeddings.{x}": state[f"patch_embed.proj.{x}"] for x in ("weight", "bias")}
    found["patch_embedding.position_embeddings"] = patches
    found |= _to_monai_blocks(state, "blocks") | {f"norm.{x}": state[f"norm.{x}"] for x in ("weight", "bias")}
    if class_token:
        if "cls_token" not in state:
            raise NotConvertible("found no CLS token")
        found["cls_token"] = _positioned_cls_token(state)
    return found


def from_monai_vit(state: State) -> State:
    """Return the weights of a MONAI `ViT`, of any of its patch embeddings and with or without query-key-value bias.

    The classification head is left out. Names of MONAI before 1.6 (`cross_attn`) are left out too.
    """
    if "patch_embedding.position_embeddings" not in state:
        raise NotConvertible("found no patch_embedding.position_embeddings, expected the names of MONAI's ViT")
    found = {"cls_token": state["cls_token"]} if "cls_token" in state else {}
    found |= _patch_embedding(state) | _from_monai_blocks(state, "blocks")
    found |= {f"norm.{x}": state[f"norm.{x}"] for x in ("weight", "bias") if f"norm.{x}" in state}
    return _with_table(found, state["patch_embedding.position_embeddings"])


def _patch_embedding(state: State) -> State:
    """Return the patch embedding as a convolution (C, in_chans, p, q, r).

    MONAI's other form, `perceptron`, is a linear layer on the voxels of a patch with the channels last. It has one
    input channel and cubic patches here, as its weight shows neither.
    """
    start = "patch_embedding.patch_embeddings."
    if f"{start}1.weight" not in state:
        return {f"patch_embed.proj.{x}": state[f"{start}{x}"] for x in ("weight", "bias")}
    weight, bias = (state[f"{start}1.{x}"] for x in ("weight", "bias"))
    return {"patch_embed.proj.weight": _as_convolution(weight), "patch_embed.proj.bias": bias}


def _as_convolution(weight: Tensor) -> Tensor:
    """Return a linear layer (C, p^3) on the voxels of a cubic patch as the weight (C, 1, p, p, p) of a convolution."""
    side = round(weight.shape[1] ** (1 / 3))
    if side**3 != weight.shape[1]:
        raise NotConvertible(f"found a linear patch embedding of {weight.shape[1]} numbers, expected a cube")
    return weight.view(len(weight), 1, side, side, side)


# ---------------------------------------------------------------- MONAI UNETR


def to_monai_unetr(state: State) -> State:
    """Return the weights for the encoder of `monai.networks.nets.UNETR(..., qkv_bias=True)`, for strict=False.

    Raises:
        NotConvertible: the ViT has not 12 blocks or not patches of 16 voxels, as that class has.
    """
    depth, patch = depth_of(state, "blocks"), tuple(state["patch_embed.proj.weight"].shape[2:])
    if (depth, patch) != (12, (16, 16, 16)):
        raise NotConvertible(f"found {depth} blocks and patches of {patch} voxels, MONAI's UNETR has 12 and 16")
    return {f"vit.{name}": value for name, value in to_monai_vit(state).items()}


def from_monai_unetr(state: State) -> State:
    """Return the encoder of a MONAI `UNETR`. Its convolutional layers are left out."""
    return from_monai_vit(clean_keys(state))


# ---------------------------------------------------------------- MONAI MaskedAutoEncoderViT


def to_monai_mae(state: State) -> State:
    """Return the weights of encoder and decoder for `monai.networks.nets.MaskedAutoEncoderViT(..., qkv_bias=True)`.

    Raises:
        NotConvertible: there is no CLS token or no decoder, the decoder has cross-attention, or its CLS row is not
            zero, which MONAI assumes.
    """
    if missing := [name for name in ("cls_token", "mask_token") if name not in state]:
        raise NotConvertible(f"found no {missing[0]}, expected the weights of an autoencoder with a CLS token")
    if any(name.startswith("decoder_blocks.0.attn.kv.") for name in state):
        raise NotConvertible("found a decoder with cross-attention, MONAI's class has one with self-attention")
    _, patches = _split_table(state)
    row, decoder_patches = _split_table(state, "decoder_pos_embed")
    if row.any():
        raise NotConvertible("found a position of the CLS token in the decoder, MONAI's class has none")
    found = {f"patch_embedding.patch_embeddings.{x}": state[f"patch_embed.proj.{x}"] for x in ("weight", "bias")}
    found |= {"patch_embedding.position_embeddings": patches, "decoder_pos_embedding": decoder_patches}
    found |= {"cls_token": _positioned_cls_token(state), "mask_tokens": state["mask_token"]}
    for blocks, norm in (("blocks", "norm"), ("decoder_blocks", "decoder_norm")):
        depth = depth_of(state, blocks)
        found |= _to_monai_blocks(state, blocks)
        found |= {f"{blocks}.{depth}.{x}": state[f"{norm}.{x}"] for x in ("weight", "bias")}
    for layer in ("decoder_embed", "decoder_pred"):
        found |= {f"{layer}.{x}": state[f"{layer}.{x}"] for x in ("weight", "bias")}
    return found


def from_monai_mae(state: State) -> State:
    """Return encoder and decoder of a MONAI `MaskedAutoEncoderViT`, for `VisionTransformer3D(encoder_only=False)`."""
    if "mask_tokens" not in state:
        raise NotConvertible("found no mask_tokens, expected the names of MONAI's MaskedAutoEncoderViT")
    found = {"cls_token": state["cls_token"], "mask_token": state["mask_tokens"]}
    found |= _patch_embedding(state)
    for blocks, norm in (("blocks", "norm"), ("decoder_blocks", "decoder_norm")):
        last = depth_of(state, blocks) - 1
        found |= _from_monai_blocks(state, blocks)
        found |= {f"{norm}.{x}": state[f"{blocks}.{last}.{x}"] for x in ("weight", "bias")}
    for layer in ("decoder_embed", "decoder_pred"):
        found |= {f"{layer}.{x}": state[f"{layer}.{x}"] for x in ("weight", "bias")}
    table = state["decoder_pos_embedding"]
    found["decoder_pos_embed"] = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
    return _with_table(found, state["patch_embedding.position_embeddings"])


# ---------------------------------------------------------------- plain MAE


# decoder, and layer between encoder and decoder, in files with an `encoder_pos_embed`
DECODERS = ("decoder", "encoder_to_decoder", "mask_token")


def from_plain_mae(state: State) -> State:
    """Return a 3D MAE checkpoint in the names of the original MAE: those of this repository, with more prefixes.

    Encoder and decoder may be in modules of their own (`encoder.blocks.0`, `decoder.blocks.0`), the patch embedding may
    be a linear layer on the voxels of cubic one-channel patches, and a query-key-value bias may be stored as `q_bias`
    and `v_bias` (its key part is zero). This covers forms quoted in public threads about loading MAE's and its
    re-implementations' files.

    Files with the names of SelfMedMAE's checkpoints are read too, their encoder alone: `encoder.*` for the ViT, its
    position table without a CLS row in `encoder_pos_embed`, and a decoder (`encoder_to_decoder`, `decoder.*`), which
    is dropped. A CLS token gets a position of zeros. Tested with made files; no real file was available.
    """
    found: State = {}
    cleaned = clean_keys(state)
    if "encoder_pos_embed" in cleaned:
        cleaned = {name: value for name, value in cleaned.items() if not name.startswith(DECODERS)}
        cleaned = _with_table(cleaned, cleaned.pop("encoder_pos_embed"))
    for key, value in cleaned.items():
        name = re.sub(r"^decoder\.(pos_embed|blocks|norm|pred|embed)\b", r"decoder_\1", key)
        if name.endswith("attn.q_bias"):
            value = torch.cat([value, torch.zeros_like(value), cleaned[key.replace("q_bias", "v_bias")]])
            name = name.replace("q_bias", "qkv.bias")
        if not name.endswith("attn.v_bias"):
            found[name] = value
    weight = found.get("patch_embed.proj.weight")
    if weight is None:
        raise NotConvertible("found no patch_embed.proj.weight, expected the names of MAE")
    if weight.ndim == 2:
        found["patch_embed.proj.weight"] = _as_convolution(weight)
    return found


# ---------------------------------------------------------------- nnssl and nnU-Net


# where this module puts the parts of the encoder
PLAN_KEYS = {
    "key_to_encoder": "encoder",
    "key_to_stem": "stem",
    "keys_to_in_proj": ["stem.proj"],
    "key_to_lpe": "encoder.pos_embed",
}


def to_nnssl(state: State) -> State:
    """Return the encoder under the names that `PLAN_KEYS` describes, for the `network_weights` of a checkpoint."""
    encoder = ("cls_token", "pos_embed", "blocks.", "norm.")
    found = {f"encoder.{name}": value for name, value in state.items() if name.startswith(encoder)}
    return found | {f"stem.proj.{x}": state[f"patch_embed.proj.{x}"] for x in ("weight", "bias")}


def from_nnssl(state: State, plan: Mapping[str, Any]) -> State:
    """Return the encoder of an nnssl checkpoint whose parts are named by its adaptation plan.

    The plan says where encoder, patch embedding and position table are; within the encoder the names must be those of
    timm's ViT. nnssl's own transformers have other layers and are refused when the encoder is built. The names come
    from the published `adaptation_plan.json` of checkpoints on the Hugging Face hub; no real checkpoint was tried.

    Raises:
        NotConvertible: the plan lacks one of these entries, or the weights have no such parts.
    """
    try:
        proj, table = plan["keys_to_in_proj"][0], plan["key_to_lpe"]
        parts = {f"{plan['key_to_encoder']}.": "", f"{proj}.": "patch_embed.proj.", table: "pos_embed"}
    except (KeyError, IndexError, TypeError):
        raise NotConvertible(f"found no {', '.join(PLAN_KEYS)} in the plan") from None
    # a reader may have removed prefixes such as `encoder.` from the names already
    prefixes = {_clean_prefix(theirs): ours for theirs, ours in parts.items()}
    found: State = {}
    for key, value in clean_keys(state).items():
        # the longest prefix is the most specific one
        for theirs in sorted(prefixes, key=len, reverse=True):
            if key.startswith(theirs):
                found[prefixes[theirs] + key.removeprefix(theirs)] = value
                break
    if missing := [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in found]:
        raise NotConvertible(f"found no {missing[0]} where the plan says, expected a plain ViT")
    return found


def _clean_prefix(prefix: str) -> str:
    name = next(iter(clean_keys({f"{prefix}|": torch.empty(0)})))
    return name.removesuffix("|")
