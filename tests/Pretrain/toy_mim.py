"""A small MiM and batches of noise for it."""

import torch

from Pretrain.models_mim import mim_convvit3d_base_patch16

TOY = dict(
    img_size=32,
    embed_dims=(6, 6, 12, 24),
    depths=(1, 1, 1, 1),
    num_heads=2,
    decoder_embed_dim=24,
    decoder_depth=1,
    decoder_num_heads=2,
    num_mid=3,
    num_down=2,
)


def toy(seed=0, **kwargs):
    torch.manual_seed(seed)
    return mim_convvit3d_base_patch16(**dict(TOY, **kwargs))


def batch_of(size, count=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {"image": torch.rand(count, 1, *(size,) * 3, generator=rng), "key": torch.arange(count) + 100 * seed}
