"""Training steps of every pretraining method on CUDA fake tensors: a tensor made on the wrong device fails here, on a
machine without a GPU, and so does a step for which the host would wait for the device."""

import math

import pytest
import torch
from torch import nn

from common.training.method import Method
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.blocks import BlockView, ViewMaker
from Pretrain.models_glmae import GLMAE, TERMS
from Pretrain.models_mae import MAE
from Pretrain.views import Box, ViewSpec
from tests.common.fake_cuda import check, fake_cuda, train
from tests.Pretrain.toy_mim import toy

LEVELS = {"rec_up", "rec_mid", "rec_down"}
ALIGN = {"align_up_mid", "align_mid_down"}
METHODS = {  # -> the losses that must be there
    "mae": {"rec_local"},
    "glmae-ce": {*TERMS, "monitor/center_norm"},
    "glmae-byol": set(TERMS),
    "mim-none": LEVELS,
    "mim-cosine": LEVELS | ALIGN,
    "mim-infonce": LEVELS | ALIGN,
    "mim-published": LEVELS | ALIGN,
}


def build(method):
    if method.startswith("mim"):
        return toy(align=method.removeprefix("mim-"))
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    decoder = dict(encoder_only=False, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    vit = VisionTransformer3D(**sizes, **decoder)
    if method == "mae":
        return MAE(vit)
    consistency = method.removeprefix("glmae-")
    return GLMAE(vit, hidden_dim=16, bottleneck_dim=8, out_dim=12, consistency=consistency, freeze_last_layer=1)


def views():
    return {
        "global": torch.rand(2, 2, 1, 32, 32, 32),
        "local": torch.rand(2, 3, 1, 16, 16, 16),
        "key": torch.zeros(2, dtype=torch.long),
    }


def volumes():
    return {"image": torch.rand(2, 1, 64, 64, 64), "key": torch.zeros(2, dtype=torch.long)}


def with_content(batch):
    """The batch with the content boxes of `--ignore_padding`."""

    def make():
        made = batch()
        # all but the voxels: (B, views), or (B, 1) for MiM
        counts = {kind: views.shape[:-4] for kind, views in made.items() if kind != "key"}
        return made | {f"{kind}_content": torch.tensor([3, 30]).repeat(*count, 3, 1) for kind, count in counts.items()}

    return make


SPECS = {"global": ViewSpec(2, (32, 32, 32)), "local": ViewSpec(3, (16, 16, 16))}
SLOW = {"mim-infonce", "mim-published"}


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.slow] if method in SLOW else []) for method in METHODS]
)
def test_no_step_leaves_the_device_or_waits_for_it(method):
    """The whole step but the backward pass: views, masks, losses, `before_step`, clipping, the watch over bad updates,
    AdamW, `after_step` (teacher, centre), running means."""
    names = METHODS[method]
    weights = {name: 1.0 for name in names if not name.startswith("monitor")}
    count = 2 if method == "glmae-ce" else 1  # what comes again in a second update or micro-batch is the same for all
    batch = volumes if method.startswith("mim") else views
    check(*train(build(method), batch, weights, updates=count, accum=count), names)


@pytest.mark.parametrize("method", ["mae", "glmae-ce", "mim-cosine"])
def test_nor_does_a_step_that_ignores_padding(method):
    names = METHODS[method]
    weights = {name: 1.0 for name in names if not name.startswith("monitor")}
    batch = with_content(volumes if method.startswith("mim") else views)
    check(*train(build(method), batch, weights), names)


def blocks():
    """What the loader hands over of two volumes: a block of each, in which or beyond which all its views lie."""
    places = [((0, 0, 0), (32, 32, 32)), ((4, 8, 0), (40, 20, 30)), ((-4, 0, 0), (16, 16, 16))]

    def views_of(sample, count):
        boxes = [Box(*places[i % len(places)], (i == 1, False, i == 0)) for i in range(count)]
        return [BlockView((sample, 0), box, 0.5, 0.1, 0) for box in boxes]

    shape = (1, 40, 36, 44)
    return {
        "numbers": [torch.zeros(math.prod(shape), dtype=torch.int16) for _ in range(2)],
        "blocks": [{(sample, 0): shape} for sample in range(2)],
        "views": {kind: [*views_of(0, spec.count), *views_of(1, spec.count)] for kind, spec in SPECS.items()},
        "key": torch.zeros(2, dtype=torch.long),
    }


@pytest.mark.parametrize("resident", [False, True])
def test_nor_does_a_step_whose_views_are_made_on_the_device(resident):
    maker = ViewMaker(SPECS)
    if resident:

        def maker(batch, device):
            shapes = {key: shape for blocks in batch["blocks"] for key, shape in blocks.items()}
            kept = {key: torch.zeros(shape, dtype=torch.int16, device=device) for key, shape in shapes.items()}
            return ViewMaker(SPECS, kept)({k: v for k, v in batch.items() if k != "numbers"}, device)

    weights = {name: 1.0 for name in TERMS}
    check(*train(build("glmae-ce"), blocks, weights, updates=2, prepare=maker), set(TERMS))


def test_nor_does_a_step_in_fp16_with_its_scaler():
    check(*train(build("glmae-ce"), views, dict.fromkeys(TERMS, 1.0), amp="fp16"), set(TERMS))


def wrong_device(x, mask):
    return x * torch.arange(3)


def made_of_a_list(x, mask):
    return x * torch.tensor([1.0, 2.0, 3.0], device=x.device)


def value_read(x, mask):
    return x / x.sum().item()


def number_read(x, mask):
    return x[mask]


def brought_home(x, mask):
    return x.cpu().to(x.device)


@pytest.mark.parametrize(
    "trap, message",
    [
        (wrong_device, "two (different )?devices,? cuda:0,? (and )?cpu"),
        (made_of_a_list, "_to_copy.default cpu -> cuda at .*test_cuda_fake.py:[0-9]+, made_of_a_list"),
        (value_read, "_local_scalar_dense.default at .*test_cuda_fake.py:[0-9]+, value_read"),
        (number_read, "index.Tensor at .*number_read"),
        (brought_home, "cuda -> cpu at .*brought_home"),
    ],
)
def test_the_traps_are_caught(trap, message):
    class Trap(Method):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, batch, step=0, part=0):
            return {"loss": trap(batch["x"] * self.weight, batch["mask"]).sum()}

        def checkpoint_state(self):
            return {}

        def load_checkpoint_state(self, content):
            pass

    def batch():
        return {"x": torch.rand(3), "mask": torch.ones(3, dtype=torch.bool)}

    with pytest.raises(Exception, match=message):
        check(*train(Trap(), batch, {"loss": 1.0}), {"loss"})


def test_autocast_is_on():
    with fake_cuda():
        x = torch.rand(2, 2, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert (x @ x).dtype == torch.bfloat16
