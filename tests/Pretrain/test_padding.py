"""Fixed views of volumes that are smaller: what `--placement` and `--ignore_padding` change in batches and losses of
every method, and that neither the division into micro-batches nor the process does."""

import copy
import functools

import pytest
import torch

from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.data import ViewDataset
from Pretrain.losses import patchify
from Pretrain.measures import reconstruction_measures
from Pretrain.models_glmae import GLMAE
from Pretrain.models_mae import MAE
from Pretrain.models_mim import MiM, cut_blocks, cut_content
from Pretrain.views import ViewSpec
from tests.helpers import ct, read_log, write_nifti
from tests.Pretrain.test_main_pretrain import assert_divisions_agree, flags, pretrain
from tests.Pretrain.toy_mim import toy

METHODS = ("mae", "glmae", "mim")
# shorter than every view along one axis at least, and by more than a patch
SHAPES = [(20, 30, 9), (12, 40, 22), (40, 11, 40), (17, 33, 28)]


class Noise:
    """A volume of noise above 0, so that padding is known by its 0."""

    def __init__(self, shape, seed=0):
        self.levels = [shape]
        self.voxels = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1

    def read(self, start, size, level=0, out_size=None):
        padded = torch.nn.functional.pad(self.voxels, [100] * 6)
        return padded[:, *(slice(a + 100, a + 100 + n) for a, n in zip(start, size))]


def spec(count, size, ignore_padding=True, placement="random"):
    size = (size,) * 3
    return ViewSpec(count, size, crop_mode="fixed", flip_prob=0.5, placement=placement, ignore_padding=ignore_padding)


def specs_of(method, **options):
    if method == "mim":
        return {"image": spec(1, 64, **options)}
    return {"local": spec(3, 16, **options)} | ({"global": spec(2, 32, **options)} if method == "glmae" else {})


def batch_of(method, **options):
    samples = ViewDataset([Noise(shape, seed) for seed, shape in enumerate(SHAPES)], specs_of(method, **options))
    return torch.utils.data.default_collate([samples[(position, position)] for position in range(len(SHAPES))])


def build(method):
    torch.manual_seed(0)
    if method == "mim":
        return toy(num_mid=4, num_down=2)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    vit = VisionTransformer3D(**sizes, encoder_only=False, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    return MAE(vit, 0.6) if method == "mae" else GLMAE(vit, hidden_dim=16, bottleneck_dim=8, out_dim=12)


def losses(method, batch):
    method.eval()
    with torch.no_grad():
        parts = [method(batch, part=part) for part in range(method.num_parts)]
    names = dict.fromkeys(name for part in parts for name in part if not name.startswith("monitor"))
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def changed(method, offsets):
    """The method with `offsets[call]` (M, N) added to all voxels that the decoder predicts in its calls."""
    method = copy.deepcopy(method)
    calls = iter(offsets)
    if isinstance(method, MiM):
        owner, name = method, "reconstruct"
        reconstruct = method.reconstruct

        def shifted(x, masking):
            offset = next(calls).gather(1, masking.ids_restore.argsort(dim=1))[:, masking.ids_keep.shape[1] :]
            handle = method.decoder.decoder_pred.register_forward_hook(lambda *call: call[-1] + offset.unsqueeze(-1))
            values = reconstruct(x, masking)
            handle.remove()
            return values

    else:
        owner, name = method.encoder, "forward_decoder"
        plain = method.encoder.forward_decoder

        @functools.wraps(plain)
        def shifted(*args):
            # the third argument says which patches are predicted: the removed ones
            return plain(*args) + next(calls).gather(1, args[2]).unsqueeze(-1)

    setattr(owner, name, shifted)
    return method


def seen_by_decoder(method, batch):
    """Return the visible patches (M, K) and which patches hold content (M, N), for every call of the decoder."""
    seen = []

    def record(module, args, kwargs):
        holds = patchify(args[0], module.patch_size).amax(dim=-1) > 0
        seen.append((kwargs["ids_keep"], holds))

    handle = method.encoder.register_forward_pre_hook(record, with_kwargs=True)
    losses(method, batch)
    handle.remove()
    return seen


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("method", METHODS)
def test_batches_without_the_option_are_unchanged(method):
    off, on = batch_of(method, ignore_padding=False), batch_of(method)
    kinds = set(specs_of(method))
    assert set(off) == kinds | {"key"} and set(on) == set(off) | {f"{kind}_content" for kind in kinds}
    assert all(torch.equal(off[name], on[name]) for name in off)


@pytest.mark.parametrize("placement", ["center", "random"])
def test_content_boxes_of_a_batch_hold_all_that_is_not_zero(placement):
    batch = batch_of("glmae", placement=placement)
    for kind in ("global", "local"):
        boxes = batch[f"{kind}_content"]
        assert boxes.shape == (*batch[kind].shape[:2], 3, 2) and boxes.dtype == torch.int64
        for view, ((a, b), (c, d), (e, f)) in zip(batch[kind].flatten(0, 1), boxes.flatten(0, 1).tolist()):
            assert view[:, a:b, c:d, e:f].min() > 0 and (view > 0).sum() == (b - a) * (d - c) * (f - e)


# ---------------------------------------------------------------- masks and losses


@pytest.mark.parametrize("method", ["mae", "glmae"])
def test_no_padding_is_visible_while_content_remains(method):
    model = build(method)
    for ids_keep, holds in seen_by_decoder(model, batch_of(method)):
        visible = holds.gather(1, ids_keep).sum(dim=1)
        assert torch.equal(visible, holds.sum(dim=1).clamp(max=ids_keep.shape[1]))
        assert not holds.all()
    plain = seen_by_decoder(model, batch_of(method, ignore_padding=False))
    assert any(not holds.gather(1, ids_keep).all() for ids_keep, holds in plain)


def test_mim_keeps_padding_last_on_its_three_levels():
    """On the upper level by units, on the others by tokens; and cuts mid and down volumes where there is content."""
    (up_keep, up), (mid_keep, mid), *down = seen_by_decoder(build("mim"), batch_of("mim"))
    # a unit of the toy is one token
    for ids_keep, holds in ((up_keep, up), (mid_keep, mid)):
        assert torch.equal(holds.gather(1, ids_keep).sum(1), holds.sum(1).clamp(max=ids_keep.shape[1]))
    # four of the eight octants are cut, and two of the eight tokens of each
    assert torch.equal(mid.any(dim=1).view(4, 4).sum(dim=1), up.sum(dim=1).clamp(max=4))
    assert torch.cat([holds for _, holds in down]).any(dim=1).sum() == mid.sum(dim=1).clamp(max=2).sum()
    assert (up.sum(dim=1) < 4).any() and (mid.sum(dim=1) < 2).any()


@pytest.mark.parametrize("method", METHODS)
def test_predictions_of_padding_do_not_enter_the_loss(method):
    model, batch = build(method), batch_of(method)
    plain, calls = losses(model, batch), seen_by_decoder(model, batch)
    assert all(value.isfinite() for value in plain.values())
    made = changed(model, [(~holds) * 7.0 for _, holds in calls])
    assert losses(made, batch) == plain
    # predictions of removed patches with content change the losses; without the option, those of padding do too
    made = losses(changed(model, [holds * 7.0 for _, holds in calls]), batch)
    assert all(made[name] > plain[name] + 1 for name in made if name.startswith("rec_"))
    batch = batch_of(method, ignore_padding=False)
    plain, calls = losses(model, batch), seen_by_decoder(model, batch)
    made = losses(changed(model, [(~holds) * 7.0 for _, holds in calls]), batch)
    assert all(made[name] > plain[name] + 0.1 for name in made if name.startswith("rec_"))


@pytest.mark.parametrize("method", METHODS)
def test_any_micro_batch_has_the_losses_of_its_volumes(method):
    model, batch = build(method), batch_of(method)
    together = losses(model, batch)
    for size in (1, 2):
        parts = [losses(model, {name: x[i : i + size] for name, x in batch.items()}) for i in range(0, 4, size)]
        for name, value in together.items():
            torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_views_without_padding_have_the_same_losses(method):
    volumes = [Noise((70, 66, 65), seed) for seed in range(2)]
    found = []
    for options in ({"ignore_padding": False, "placement": "center"}, {}):
        samples = ViewDataset(volumes, specs_of(method, **options))
        batch = torch.utils.data.default_collate([samples[(position, position)] for position in range(2)])
        found.append(losses(build(method), batch))
    assert found[0] == found[1]


def test_a_view_without_removed_content_has_no_loss():
    model, batch = build("mae"), batch_of("mae")
    # a single voxel, which is then visible
    batch["local_content"][:] = torch.tensor([[5, 6]] * 3)
    value = model(batch)["rec_local"]
    value.backward()
    assert value == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_content_is_cut_like_the_volume():
    x = Noise((64, 48, 32)).voxels.unsqueeze(0) * torch.ones(3, 1, 1, 1, 1)
    boxes = torch.tensor([[[5, 40], [0, 48], [17, 20]], [[0, 16], [16, 32], [16, 32]], [[60, 64], [1, 2], [0, 32]]])
    for row, ((a, b), (c, d), (e, f)) in enumerate(boxes.tolist()):
        inside = torch.zeros_like(x[row])
        inside[:, a:b, c:d, e:f] = 1
        x[row] *= inside
    ids = torch.arange(24).expand(3, -1)
    blocks, cut = cut_blocks(x, (16, 16, 16), ids), cut_content(boxes, (16, 16, 16), (4, 3, 2), ids)
    for block, box in zip(blocks, cut.tolist(), strict=True):
        (a, b), (c, d), (e, f) = box
        assert all(0 <= low <= high <= 16 for low, high in box)
        assert (block > 0).sum() == (block[:, a:b, c:d, e:f] > 0).sum() == (b - a) * (d - c) * (f - e)


@pytest.mark.parametrize("method", METHODS)
def test_health_measures_the_patches_of_the_loss(method):
    model, batch = build(method), batch_of(method)
    with torch.no_grad():
        rows = model.reconstructions(batch)
    for made in rows.values():
        holds = patchify(made.view, model.encoder.patch_size).abs().amax(dim=-1) > 0
        assert made.mask.sum() > 0 and not (made.mask.bool() & ~holds).any()
        other = made._replace(prediction=made.prediction + 7.0 * (~holds).unsqueeze(-1))
        measured = [reconstruction_measures(row, model.encoder.patch_size, 1e-6) for row in (made, other)]
        assert measured[0]["psnr"].isfinite() and measured[0]["over_mean"].isfinite()
        # over_position is NaN where no patch is removed from two views
        torch.testing.assert_close(*measured, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- the program

PADDED = "--crop_mode fixed --placement random --ignore_padding".split()
MIM = "--embed_dims 6 6 12 24 --depths 1 1 1 1 --num_mid 2 --num_down 2 --patch_size 16 --local_size 32".split()


def options(method):
    if method != "mim":
        return PADDED
    return [*PADDED, *MIM]


def words(method):
    """`flags` of a method; MiM has no --embed_dim and --depth."""
    found = flags(method)
    for name in ("--embed_dim", "--depth") if method == "mim" else ():
        at = found.index(name)
        del found[at : at + 2]
    return [*found, *options(method)]


@pytest.fixture(scope="module")
def small_scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    for i, shape in enumerate(((12, 40, 9), (30, 11, 20), (14, 14, 14))):
        write_nifti(folder / f"scan{i}.nii.gz", ct(shape, seed=i))
    return folder


@pytest.mark.parametrize("method", ["mae", "glmae"])
def test_a_run_that_ignores_padding(small_scans, tmp_path, method):
    pretrain(small_scans, tmp_path / "run", *PADDED, method=method)
    lines = read_log(tmp_path / "run")
    assert all(0 < line["rec_local"] < 3 and "health/local/psnr" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_processes_and_micro_batches_change_no_loss(small_scans, tmp_path, method):
    data = ["--datalist", small_scans, "--cache_dir", tmp_path / "cache", "--epochs", 3]
    settings = [*words(method), *data, "--samples_per_epoch", 2]
    assert_divisions_agree(settings, tmp_path, epochs=3, terms=("rec_", "grad_norm"))
