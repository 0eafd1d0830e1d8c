"""GL-MAE's contract: the properties of spec section 14, on a small encoder."""

import copy
import itertools

import pytest
import torch
from torch.nn.functional import log_softmax, softmax

from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.health import report
from Pretrain.losses import cross_entropy_pairs, masked_mse, norm_pix, patchify
from Pretrain.models_glmae import GLMAE, TERMS, kinds_of_parts
from Pretrain.models_mae import MAE, complete_reconstruction, encode_visible, reconstruct, view_keys, view_major


def small_vit(**kwargs):
    defaults = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, encoder_only=False)
    return VisionTransformer3D(**(defaults | dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2) | kwargs))


def small_glmae(**kwargs):
    torch.manual_seed(0)
    return GLMAE(small_vit(), **(dict(hidden_dim=32, bottleneck_dim=8, out_dim=16) | kwargs))


def batch(volumes=2, p=2, q=3):
    rng = torch.Generator().manual_seed(1)
    return {
        "global": torch.rand(volumes, p, 1, 32, 32, 32, generator=rng),
        "local": torch.rand(volumes, q, 1, 16, 16, 16, generator=rng),
        "key": torch.arange(volumes) + 11,
    }


def update(method, data, step=0, lr=1e-2):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
    values = report(method, data, step)
    sum(values[t] for t in method.terms).backward()
    method.before_step(step)
    optimizer.step()
    method.after_step(step)
    return values


def test_trainable_parameters_get_gradients_and_the_teacher_none():
    method = small_glmae()
    values = report(method, batch(), 0)
    sum(values[t] for t in method.terms).backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())


def test_teacher_moves_by_ema_alone():
    method = small_glmae(momentum=lambda step: 0.9)
    before = {n: p.clone() for n, p in method.teacher.named_parameters()}
    update(method, batch())
    student = dict(method.student.named_parameters())
    for name, old in before.items():
        expected = 0.9 * old + 0.1 * student[name]
        torch.testing.assert_close(dict(method.teacher.named_parameters())[name], expected)
    assert any((student[n] - old).abs().max() > 0 for n, old in before.items())


def test_teacher_with_momentum_one_is_constant():
    method = small_glmae(momentum=lambda step: 1.0)
    before = copy.deepcopy(method.teacher.state_dict())
    update(method, batch())
    assert all(torch.equal(v, method.teacher.state_dict()[k]) for k, v in before.items())


def test_the_teacher_sees_the_same_views_without_a_mask():
    """The teacher's input is the very tensor the student's mask is applied to, and no id list reaches it."""
    method, data, seen = small_glmae(), batch(), {}

    def spy(name):
        def hook(module, args, kwargs):
            seen.setdefault(name, []).append((args[0], kwargs.get("ids_keep")))

        return hook

    method.teacher["backbone"].register_forward_pre_hook(spy("teacher"), with_kwargs=True)
    method.student["backbone"].register_forward_pre_hook(spy("student"), with_kwargs=True)
    report(method, data, 0)
    ((teacher_input, teacher_ids),) = seen["teacher"]
    student_input, student_ids = seen["student"][0]
    assert torch.equal(teacher_input, student_input) and torch.equal(teacher_input, view_major(data["global"]))
    assert teacher_ids is None
    assert student_ids.shape == (4, 25)  # 64 patches, 60 % removed
    assert all(ids is not None for _, ids in seen["student"])


def test_only_removed_patches_are_predicted_and_compared():
    """The loss equals that of predictions of all patches, restricted to the removed ones."""
    vit, x = small_vit(), torch.rand(2, 1, 16, 16, 16)
    visible = encode_visible(vit, x, torch.tensor([3, 4]), 0.5)
    loss, prediction = reconstruct(vit, x, visible, True)
    assert prediction.shape == (2, 4, 512)
    made = complete_reconstruction(vit, x, visible)
    torch.testing.assert_close(masked_mse(made.prediction, norm_pix(patchify(x, vit.patch_size)), made.mask), loss)
    assert made.prediction[made.mask == 0].abs().max() == 0


def test_local_reconstruction_alone_is_plain_mae_bit_for_bit():
    data = batch()
    glmae = GLMAE(small_vit(), terms=("rec_local",), mask_ratio_local=0.6)
    mae = MAE(copy.deepcopy(glmae.encoder), mask_ratio=0.6)
    del data["global"]
    a, b = glmae(data)["rec_local"], mae(data)["rec_local"]
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    gradients = {n: p.grad for n, p in mae.encoder.named_parameters()}
    for name, p in glmae.encoder.named_parameters():
        assert (p.grad is None and gradients[name] is None) or torch.equal(p.grad, gradients[name]), name
    assert list(glmae.teacher.parameters()) == []


def test_the_teacher_has_no_dropout_and_no_graph():
    torch.manual_seed(0)
    method, data = GLMAE(small_vit(drop_path_rate=0.5), hidden_dim=32, bottleneck_dim=8, out_dim=16).train(), batch()
    assert method.encoder.blocks[1].training
    first, second = (method._teacher_targets(data["global"], 0) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


def test_one_global_view_keeps_global_to_global_defined():
    values = small_glmae()(batch(p=1))
    assert values["global_global"].isfinite() and values["global_global"] > 0


def test_global_pairs_same_is_the_diagonal():
    data = batch()
    everything, same = small_glmae(), small_glmae(gg_pairs="same")
    same.load_state_dict(everything.state_dict())
    teacher = everything._teacher_targets(data["global"], 0)
    visible = encode_visible(everything.encoder, view_major(data["global"]), view_keys(data["key"], 2, kind=1), 0.6)
    student = everything._project(visible.tokens[:, 0]).unflatten(0, (2, 2))
    loop = torch.stack([torch.stack([-(teacher[i] * student[j]).sum(-1).mean() for j in range(2)]) for i in range(2)])
    torch.testing.assert_close(everything(data)["global_global"], loop.mean())
    torch.testing.assert_close(same(data)["global_global"], loop.diagonal().mean())


def test_cross_entropy_pairs_equal_the_loop():
    teacher, student = softmax(torch.randn(2, 3, 5), -1), log_softmax(torch.randn(4, 3, 5), -1)
    loop = [[-(teacher[i] * student[j]).sum(-1).mean() for j in range(4)] for i in range(2)]
    torch.testing.assert_close(cross_entropy_pairs(teacher, student), torch.tensor(loop))


def test_center_follows_all_teacher_outputs_once_per_update():
    method, data = small_glmae(center_momentum=0.8), batch()
    logits = method.teacher["head"](method.teacher["backbone"](view_major(data["global"]))).mean(0, keepdim=True)
    method(data)
    method(data)  # two micro-batches of one update
    assert method.center.abs().max() == 0
    method.after_step(0)
    torch.testing.assert_close(method.center, 0.2 * logits)


def test_entropy_of_mean_is_that_of_the_update():
    """Micro-batches of one volume give the value of the full batch. It is above their mean, as entropy is concave."""
    data = batch(volumes=4)
    full, parts, alone = (small_glmae(teacher_temp=lambda step: 0.01, center_momentum=1.0) for _ in range(3))
    full(data)
    of_volumes = []
    for row in range(4):
        volume = {name: value[row : row + 1] for name, value in data.items()}
        parts(volume)
        alone(volume)
        of_volumes.append(alone.after_step(0)["monitor/entropy_of_mean"])
    expected, found = (m.after_step(0)["monitor/entropy_of_mean"] for m in (full, parts))
    torch.testing.assert_close(found, expected)
    assert torch.stack(of_volumes).mean() < expected


def test_prototypes_are_frozen_at_first():
    method = small_glmae(freeze_last_layer=1)
    weight = method.student["head"].last_layer.weight_v
    before = weight.clone()
    update(method, batch(), step=0)
    assert torch.equal(weight, before)
    weight.grad = None
    update(method, batch(), step=1)
    assert not torch.equal(weight, before)


def test_checkpoint_restores_teacher_centre_and_loss():
    data = batch()
    method = small_glmae(momentum=lambda step: 0.5)
    update(method, data)
    twin = small_glmae(momentum=lambda step: 0.5)
    assert not torch.equal(twin.center, method.center)
    twin.load_checkpoint_state(copy.deepcopy(method.checkpoint_state()))
    assert torch.equal(twin.center, method.center)
    for term in method.terms:
        assert torch.equal(report(method, data, 1)[term], report(twin, data, 1)[term])


def test_written_layout_reads_as_the_authors_loaders_do():
    """Both loaders pick `student`; one strips `module.backbone.`, the other puts `vit` in its place."""
    method = small_glmae()
    state = method.checkpoint_state()
    assert set(state) == {"student", "teacher", "dino_loss"} and set(state["dino_loss"]) == {"center"}
    stripped = {k.replace("module.backbone.", ""): v for k, v in state["student"].items() if "module.backbone." in k}
    encoder = small_vit(encoder_only=True)
    missing, unexpected = encoder.load_state_dict(stripped, strict=False)
    assert missing == [] and all(k.startswith(("decoder_", "mask_token")) for k in unexpected)
    renamed = {k.replace("module.backbone", "vit") for k in state["student"]}
    assert {f"vit.{k}" for k in encoder.state_dict()} <= renamed
    assert {k.split(".")[0] for k in state["teacher"]} == {"backbone", "head"}
    assert {"module.head.last_layer.weight_g", "module.head.last_layer.weight_v", "module.head.mlp.4.bias"} <= set(
        state["student"]
    )
    assert not any("decoder" in k or k.startswith("module.") for k in state["teacher"])


def test_byol_has_no_prototypes_and_trains_every_parameter():
    method = small_glmae(consistency="byol")
    values = report(method, batch(), 0)
    assert not any("last_layer" in n for n, _ in method.named_parameters())
    sum(values[t] for t in method.terms).backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_byol_is_zero_for_equal_embeddings_only():
    """Without mask and predictor the student's embedding of a view is the teacher's: 2 - 2 cos = 0."""
    options = dict(consistency="byol", gg_pairs="same", terms=("global_global",))
    equal, masked = (small_glmae(mask_ratio_global=ratio, **options) for ratio in (0.0, 0.75))
    for method in (equal, masked):
        method.student["predictor"] = torch.nn.Identity()
    assert equal(batch())["global_global"].item() == pytest.approx(0.0, abs=1e-5)
    assert masked(batch())["global_global"].item() > 1e-3


@pytest.mark.parametrize("consistency", ["ce", "byol"])
def test_bfloat16_autocast_is_close_and_losses_are_float32(consistency):
    method, data = small_glmae(consistency=consistency), batch()
    full = report(method, data, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = report(method, data, 0)
    sum(half[t] for t in method.terms).backward()
    for term in method.terms:
        assert half[term].dtype == torch.float32
        torch.testing.assert_close(half[term], full[term], atol=0.05, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_unknown_term_is_named():
    with pytest.raises(ValueError, match="globule"):
        small_glmae(terms=("globule",))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_last_part_trains_every_layer(count):
    """DDP reduces gradients in the last backward pass of an update, and waits there for those of all parameters."""
    for terms in itertools.combinations(TERMS, count):
        needed = ["rec" in str(terms), "global_global" in terms or "global_local" in terms]
        vit = small_vit() if needed[0] else small_vit(encoder_only=True)
        method, data = GLMAE(vit, terms=terms, hidden_dim=16, bottleneck_dim=8, out_dim=12), batch()
        for part in range(method.num_parts):
            method.zero_grad()
            reported = method(data, part=part)
            sum(reported[term] for term in terms if term in reported).backward()
        assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None], terms


def test_kinds_of_view_have_a_pass_each_where_they_can():
    assert kinds_of_parts(TERMS) == [["global"], ["local"]]
    assert kinds_of_parts(["rec_global", "rec_local", "global_global"]) == [["local"], ["global"]]
    assert kinds_of_parts(["rec_global", "global_local"]) == [["global", "local"]]
    assert kinds_of_parts(["rec_local"]) == [["local"]]
