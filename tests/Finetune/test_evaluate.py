"""Scoring of files: pairing, spaces, lists, and what is refused."""

import gzip
import json
import re

import nibabel as nib
import numpy as np
import pytest

from common.errors import InputError
from Finetune.evaluate import main
from Finetune.evaluation.protocol import read_protocol
from tests.Finetune.scoring import AFFINE, run, save


def test_scores_do_not_depend_on_flipped_axes(two_cases):
    before = run(two_cases)["mean"]
    label = two_cases / "label/label0036.nii.gz"
    # 4D with one channel is a volume
    save(label, np.asarray(nib.load(label).dataobj)[..., None])
    path = two_cases / "p/img0035.nii.gz"
    nib.save(nib.as_closest_canonical(nib.load(path)), path)
    assert run(two_cases)["mean"] == before


def test_labels_from_a_list_and_note_of_missing_cases(two_cases):
    before = run(two_cases)["mean"]
    numbers = ("0035", "0036", "0037")
    cases = [{"name": f"img{n}", "image": f"x/img{n}.nii.gz", "label": f"label/label{n}.nii.gz"} for n in numbers]
    (two_cases / "list.json").write_text(json.dumps({"training": cases, "labels_by": "students"}))
    card = run(two_cases, "--labels", two_cases / "list.json")
    assert card["mean"] == before and card["protocol"]["labels_by"] == "students"
    assert any(re.search("1 case.* are in no mean: img0037", note) for note in card["notes"])
    (two_cases / "list.json").write_text(json.dumps({"training": cases[:1]}))
    with pytest.raises(InputError, match="img0036.nii.gz: found no label"):
        run(two_cases, "--labels", two_cases / "list.json")


def test_bad_label_maps_are_refused(two_cases):
    label, path = np.asarray(nib.load(two_cases / "label/label0035.nii.gz").dataobj), two_cases / "p/img0035.nii.gz"
    damaged = bytearray(gzip.compress(nib.Nifti1Image(label.astype(np.uint8), AFFINE).to_bytes(), mtime=0))
    # nibabel reads this without an error, as other labels
    damaged[200:260] = b"\xff" * 60
    colours = nib.Nifti1Image(np.zeros(label.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE)
    for write, message in (
        (lambda: save(path, label[:-1]), r"\(29, 28, 26\), expected \(30, 28, 26\)"),
        (lambda: save(path, label, np.diag([-2.0, -2.0, 3.3, 1.0])), "shift of .* mm"),
        (lambda: save(path, np.where(label == 1, 14, label)), "label value 14"),
        (lambda: path.write_bytes(b"no nifti"), "gzip"),
        (lambda: path.write_bytes(damaged), "CRC"),
        (lambda: nib.save(colours, path), "data"),
    ):
        write()
        with pytest.raises(InputError, match=f"img0035.nii.gz: .*{message}"):
            run(two_cases)
    assert not list((two_cases / "card").iterdir())


def test_bad_settings_and_protocols_are_refused(two_cases):
    for extra, message in (
        (["--worst", "-1"], "--worst -1.* 0"),
        (["--images", two_cases / "nowhere"], "--images .*nowhere"),
        (["--labels", two_cases / "nowhere"], "--labels .*nowhere"),
        (["--predictions", two_cases / "nowhere"], "--predictions .*nowhere"),
        (["--preset", "CC_CCII"], "CC_CCII.* classification"),
        (["--labels", two_cases / "p"], "img0035.nii.gz.* own label"),
    ):
        with pytest.raises(InputError, match=message):
            run(two_cases, *extra)
    for content in ("no json", "[]", '{"checkpoints": 3}', '{"checkpoints": [{}], "cases": []}'):
        (two_cases / "p/predictions.json").write_text(content)
        with pytest.raises(InputError, match="predictions.json: not a protocol"):
            run(two_cases)
    (two_cases / "label/label0035.nii.gz").unlink()
    with pytest.raises(InputError, match="img0035.nii.gz: found no label"):
        run(two_cases)
    for path in (two_cases / "p").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="found no label map"):
        run(two_cases)
    with pytest.raises(InputError, match="--labels: missing"):
        main(["--predictions", str(two_cases / "p"), "--out", str(two_cases / "x")])
    assert not (two_cases / "card").exists()


@pytest.mark.parametrize("content", [b"\xff" * 5000, b"", b"{}", b"[" * 100_000])
def test_a_file_that_is_no_protocol_is_named_in_one_line(tmp_path, content):
    (tmp_path / "predictions.json").write_bytes(content)
    with pytest.raises(InputError, match=r"predictions\.json: not a protocol") as raised:
        read_protocol(tmp_path)
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)
