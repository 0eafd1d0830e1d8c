"""Prediction: in the space of the file for every orientation, against MONAI, and complete files or none."""

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.transforms import SpatialResample
from scipy import ndimage

from common import checkpoint, files
from common.data import volume_io
from common.errors import InputError
from Finetune.architectures import load_finetuned
from Finetune.inference.ensemble import load_ensemble
from Finetune.predict import main
from Finetune.presets import load_preset
from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.Finetune.predicting import AFFINES, run, save_checkpoint, write_ct


class Bright(torch.nn.Module):
    """Stands in for a perfect network: the class is the brightness."""

    def __init__(self, classes):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.linspace(0, 1, classes))

    def forward(self, x):
        return -((x - self.levels.reshape(1, -1, 1, 1, 1)) ** 2) * 50


@pytest.fixture(scope="module")
def preset():
    return load_preset("sample_abdomen")


@pytest.fixture(scope="module")
def file(tmp_path_factory, preset):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c.pth", preset)


@pytest.mark.parametrize("kind", AFFINES)
def test_prediction_aligns_with_its_image(tmp_path, monkeypatch, file, kind):
    shape = (30, 28, 26)
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    # differs from itself after any flip or swap of axes
    bright = 0.3 + 0.5 * x + 0.3 * y**2 - 0.25 * z + 0.1 * np.sin(6 * z)
    nifti = nib.Nifti1Image((bright * 425 - 175).astype(np.int16), AFFINES[kind])
    nifti.set_qform(AFFINES[kind], 1)
    nifti.set_sform(AFFINES[kind], 2)
    nifti.header.set_xyzt_units("mm", "sec")
    (tmp_path / "in").mkdir()
    nib.save(nifti, tmp_path / "in/scan.nii.gz")
    monkeypatch.setattr("Finetune.predict.mean_logits", lambda *_: Bright(14).requires_grad_(False))
    run(file, tmp_path / "in", tmp_path / "out")
    source, found = nib.load(tmp_path / "in/scan.nii.gz"), nib.load(tmp_path / "out/scan.nii.gz")
    assert found.shape == source.shape and found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.affine, source.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "srow_x", "quatern_b"):
        np.testing.assert_array_equal(found.header[field], source.header[field])
    error = (np.asarray(found.dataobj) - bright.clip(0, 1) * 13)[(slice(2, -2),) * 3]
    # rounding to a class is 0.5; a shift by a voxel would add 0.3 or more
    assert np.abs(error).max() < 0.75
    assert np.abs(error.mean()) < 0.03


def test_dicom_series_is_predicted_in_its_own_space(tmp_path, file):
    hu, _ = phantom((40, 36, 20), seed=0)
    write_dicom(tmp_path / "in/series", hu, affine_of(hu.shape, (3.0, 3.0, 4.0)))
    run(file, tmp_path / "in", tmp_path / "out")
    image = volume_io.read_image(tmp_path / "in/series")
    found = nib.load(tmp_path / "out/series.nii.gz")
    np.testing.assert_allclose(found.affine, image.meta["original_affine"], atol=1e-4)
    assert volume_io.read_label(tmp_path / "out/series.nii.gz", image).shape[1:] == image.shape[1:]


def test_labels_equal_monais_inferer_and_resampling(tmp_path, preset, file):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["oblique"])
    run(file, tmp_path / "in", tmp_path / "out", "--no-overlays")
    model, architecture, *_ = load_finetuned(file)
    image = volume_io.read_image(tmp_path / "in/scan.nii.gz")
    prepared, _ = preset.preprocessing.apply(image)
    inferer = SlidingWindowInferer(architecture.roi, 1, overlap=0.5, mode="gaussian")
    with torch.no_grad():
        logits = inferer(prepared[None], model)[0]
    logits = volume_io.MetaTensor(logits.as_tensor(), affine=prepared.affine)
    affine = nib.load(tmp_path / "in/scan.nii.gz").affine
    back = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)(
        logits, dst_affine=torch.from_numpy(affine), spatial_size=(30, 28, 26)
    )
    found = np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj)
    # outside the foreground box predict writes background, MONAI the nearest class
    inside = found > 0
    assert inside.mean() > 0.2
    assert (found[inside] == back.argmax(0).numpy()[inside]).mean() > 0.999


def test_labels_equal_monais_exactly_without_resampling(tmp_path, preset):
    plain = replace(preset, spacing=None, foreground_threshold=None)
    own = save_checkpoint(tmp_path / "plain.pth", plain)
    write_ct(tmp_path / "in/scan.nii.gz", preset, np.diag([3.0, 3.0, 3.0, 1.0]), shape=(45, 33, 36))
    run(own, tmp_path / "in", tmp_path / "out", "--no-overlays", "--blending", "constant")
    model, architecture, *_ = load_finetuned(own)
    prepared, _ = plain.preprocessing.apply(volume_io.read_image(tmp_path / "in/scan.nii.gz"))
    with torch.no_grad():
        logits = SlidingWindowInferer(architecture.roi, 1, overlap=0.5, mode="constant")(prepared[None], model)[0]
    found = np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj)
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, logits.argmax(0).numpy())


def test_logits_that_are_not_finite_give_no_label_map(tmp_path, preset, file, capsys):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["flipped"])
    content = checkpoint.load(file)
    content["state_dict"]["out.conv.conv.bias"][3] = float("nan")
    checkpoint.save(tmp_path / "nan.pth", content)
    with pytest.raises(InputError, match="1 of 1 volumes"):
        run(tmp_path / "nan.pth", tmp_path / "in", tmp_path / "out")
    assert "logits are not finite" in capsys.readouterr().out and not list((tmp_path / "out").glob("*.nii.gz"))


def test_probabilities_and_protocol(tmp_path, preset, file):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["permuted"])
    run(file, tmp_path / "in", tmp_path / "out", "--probabilities", "--flips", "--overlap", 0.25)
    found = nib.load(tmp_path / "out/scan.nii.gz")
    share = nib.load(tmp_path / "out/scan_probabilities.nii")
    assert share.shape == (*found.shape, 14)
    np.testing.assert_allclose(share.affine, found.affine, atol=1e-5)
    values = share.get_fdata()
    np.testing.assert_allclose(values.sum(-1), 1, atol=14 / 255)
    top = np.take_along_axis(values, np.asarray(found.dataobj).astype(int)[..., None], -1)[..., 0]
    assert (top >= values.max(-1) - 1.01 / 255).all()
    protocol = json.loads((tmp_path / "out/predictions.json").read_text())
    assert protocol["flips"] and protocol["overlap"] == 0.25 and protocol["cases"] == ["scan"]
    assert protocol["checkpoints"][0]["sha256"] == files.file_sha256(file)
    assert (tmp_path / "out/overlays/scan.png").stat().st_size > 1000
    # no temporary file is left
    assert not list((tmp_path / "out").rglob(".*"))


def test_the_largest_component_is_kept(tmp_path, preset, file):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["permuted"])
    run(file, tmp_path / "in", tmp_path / "all")
    before = np.asarray(nib.load(tmp_path / "all/scan.nii.gz").dataobj)
    split = [n for n in range(1, 14) if ndimage.label(before == n)[1] > 1]
    assert split
    run(file, tmp_path / "in", tmp_path / "out", "--largest_component", *split)
    after = np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj)
    assert all(ndimage.label(after == n)[1] == 1 for n in split)
    assert json.loads((tmp_path / "out/predictions.json").read_text())["largest_component"] == split


def test_the_largest_component_of_all_classes_is_kept(tmp_path, monkeypatch, file):
    hu = np.full((30, 28, 26), -175, np.int16)
    # a trunk of two classes, and an arm in which the brighter one is larger
    hu[2:16, 4:24, 4:22] = 25
    hu[6:10, 8:12, 8:12] = 200
    hu[20:28, 4:24, 4:22] = 200
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(hu, np.diag([1.5, 1.5, 1.5, 1])), tmp_path / "in/scan.nii.gz")
    monkeypatch.setattr("Finetune.predict.mean_logits", lambda *_: Bright(14).requires_grad_(False))
    run(file, tmp_path / "in", tmp_path / "all")
    run(file, tmp_path / "in", tmp_path / "one", "--largest_foreground")
    before, after = (np.asarray(nib.load(tmp_path / f"{name}/scan.nii.gz").dataobj) for name in ("all", "one"))
    assert ndimage.label(before)[1] == 2
    np.testing.assert_array_equal(after[:18], before[:18])
    assert not after[18:].any() and len(np.unique(after[:18])) > 2
    assert json.loads((tmp_path / "one/predictions.json").read_text())["largest_foreground"] is True


def test_bad_volumes_are_named_and_others_predicted(tmp_path, preset, file, capsys):
    write_ct(tmp_path / "in/good.nii.gz", preset, AFFINES["flipped"])
    (tmp_path / "in/torn.nii.gz").write_bytes((tmp_path / "in/good.nii.gz").read_bytes()[:2000])
    with pytest.raises(InputError, match="1 of 2 volumes.*torn"):
        run(file, tmp_path / "in", tmp_path / "out")
    assert "torn.nii.gz" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"good.nii.gz", "overlays", "predictions.json"}


def test_bad_input_is_refused(tmp_path, preset, file):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        run(file, tmp_path / "empty", tmp_path / "out")
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["flipped"])
    with pytest.raises(InputError, match="no volume called plain"):
        run(file, tmp_path / "in", tmp_path / "out", "--cases", "validation")
    torch.save({"student": {}}, tmp_path / "pretraining.pth")
    with pytest.raises(InputError, match="pretraining.pth.*fine-tuned"):
        run(tmp_path / "pretraining.pth", tmp_path / "in", tmp_path / "out")
    for wrong in (-1, 0):
        with pytest.raises(InputError, match=f"--sw_batch_size {wrong}.*1"):
            run(file, tmp_path / "in", tmp_path / "out", "--sw_batch_size", wrong)
    with pytest.raises(InputError, match="--largest_component 14: .*13"):
        run(file, tmp_path / "in", tmp_path / "out", "--largest_component", 1, 14)
    classes = load_preset("CC_CCII")
    save_checkpoint(tmp_path / "classes.pth", classes, model="classifier")
    with pytest.raises(InputError, match="classes.pth: .*CC_CCII.*classification"):
        run(tmp_path / "classes.pth", tmp_path / "in", tmp_path / "out")
    # a file where the folder should be
    shutil.copy(tmp_path / "in/scan.nii.gz", tmp_path / "out")
    with pytest.raises(InputError, match="out: cannot be written"):
        run(file, tmp_path / "in", tmp_path / "out")


def test_images_are_never_overwritten(tmp_path, preset, file):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["flipped"])
    before = (tmp_path / "in/scan.nii.gz").read_bytes()
    (tmp_path / "list.txt").write_text("in/scan.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for images, out in (("in", "in"), ("in", "in/predictions"), ("list.txt", "in"), ("in", "link")):
        with pytest.raises(InputError, match="--out"):
            run(file, tmp_path / images, tmp_path / out)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["scan.nii.gz"]
    assert (tmp_path / "in/scan.nii.gz").read_bytes() == before


def test_lists_may_name_files_anywhere(tmp_path, preset, file):
    write_ct(tmp_path / "far.nii.gz", preset, AFFINES["flipped"])
    (tmp_path / "lists").mkdir()
    for path in ("../far.nii.gz", str(tmp_path / "far.nii.gz")):
        (tmp_path / "lists/list.txt").write_text(path)
        run(file, tmp_path / "lists/list.txt", tmp_path / "out", "--no-overlays", "--data_root", "/")
        (tmp_path / "out/far.nii.gz").unlink()


def test_stopped_prediction_leaves_no_partial_files(tmp_path, monkeypatch, preset, file):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["flipped"])
    run(file, tmp_path / "in", tmp_path / "out", "--no-overlays")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("Finetune.predict.label_map", stopped)
    (tmp_path / "out/scan.nii.gz").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "in", tmp_path / "out", "--no-overlays", "--probabilities")
    assert not list((tmp_path / "out").iterdir())


def test_full_disk_is_reported_before_inference(tmp_path, monkeypatch, preset, file, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["flipped"])
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match="1 of 1 volumes"):
        run(file, tmp_path / "in", tmp_path / "out", "--no-overlays", "--probabilities")
    assert "scan_probabilities.nii: cannot be written (No space left" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert json.loads((tmp_path / "out/predictions.json").read_text())["failed"] == ["scan"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["args"]["architecture"].update(embed_dim=10**9), "embed_dim.*65536"),
        (lambda c: c["args"]["architecture"].update(embed_dim=65536, feature_size=4096), "does not fit"),
        (lambda c: c["args"]["architecture"].update(num_heads=7), "cannot be built"),
        (lambda c: c["args"]["preset"].update(labels={0: "a"}), "labels"),
        (lambda c: c["args"].update(config=None), "config"),
        (lambda c: c["args"]["config"].update(overlap=torch.zeros(2)), "overlap"),
        (lambda c: c["args"].update(training_cases=[{}]), "training_cases"),
        (lambda c: c["args"].update(leak=torch.zeros(1)), "leak"),
        (lambda c: c["state_dict"].update({7: torch.zeros(1)}), "not dense tensors: 7"),
        (lambda c: c.update(state_dict=[]), "found list"),
    ],
)
def test_other_values_in_a_checkpoint_are_refused(tmp_path, change, words):
    save_checkpoint(tmp_path / "a.pth", load_preset("MSD09_Spleen"))
    content = checkpoint.load(tmp_path / "a.pth")
    change(content)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"a.pth.*({words})"):
        load_ensemble([tmp_path / "a.pth"])


def test_a_link_to_itself_among_the_images_is_reported(tmp_path, capsys):
    save_checkpoint(tmp_path / "a.pth", load_preset("MSD09_Spleen"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.nii.gz").symlink_to(tmp_path / "images/x.nii.gz")
    words = ["--checkpoint", tmp_path / "a.pth", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="no label map: x"):
        main(list(map(str, words)))
    assert "x.nii.gz: cannot be read" in capsys.readouterr().out
