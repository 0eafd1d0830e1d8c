"""The forward passes on CUDA fake tensors: a tensor made on the wrong device fails here, on a machine without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.models_glmae import GLMAE
from Pretrain.models_mae import MAE


def build(method):
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    decoder = dict(encoder_only=False, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    vit = VisionTransformer3D(**sizes, **decoder)
    if method == "mae":
        return MAE(vit)
    return GLMAE(vit, hidden_dim=16, bottleneck_dim=8, out_dim=12, consistency=method.removeprefix("glmae-"))


@pytest.mark.parametrize("method", ["mae", "glmae-ce", "glmae-byol"])
def test_losses_are_computed_on_the_device(method):
    model = build(method)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode():
        on_cuda = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors}
        batch = {
            "global": torch.rand(2, 2, 1, 32, 32, 32, device="cuda"),
            "local": torch.rand(2, 3, 1, 16, 16, 16, device="cuda"),
            "key": torch.zeros(2, dtype=torch.long, device="cuda"),
        }
        with torch.autocast("cuda", dtype=torch.bfloat16):
            values = functional_call(model, on_cuda, (batch, 0))
        assert values and all(
            v.device.type == "cuda" and v.dtype == torch.float32 and v.ndim == 0 for v in values.values()
        )


def test_the_check_catches_a_tensor_on_the_wrong_device():
    with FakeTensorMode(), pytest.raises(Exception, match="device"):
        torch.rand(2, device="cuda") + torch.rand(2)
