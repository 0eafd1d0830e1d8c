"""The score card of files: pairing, geometry, rules, notes, comparison, pictures."""

import csv
import gzip
import json
import re

import nibabel as nib
import numpy as np
import pytest

from common.errors import InputError
from Finetune.evaluate import main
from Finetune.evaluation.statistics import difference
from Finetune.presets import load_preset
from tests.Finetune.made import volume

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), path)


def run(folder, *extra, out="card"):
    flags = ["--predictions", folder / "p", "--labels", folder / "label", "--preset", "BTCV", "--out", folder / out]
    main([*map(str, flags), *map(str, extra)])
    return json.loads((folder / out / "scores.json").read_text())


@pytest.fixture
def two_cases(tmp_path):
    """Two BTCV cases. The second has no kidneys; its prediction misses the spleen and has a false positive kidney."""
    for number, name in enumerate(("0035", "0036")):
        _, label = volume(load_preset("BTCV"), number)
        prediction = np.roll(label, 1, axis=1)
        if number:
            label[(label == 2) | (label == 3)] = 0
            prediction[(prediction == 1) | (prediction == 3)] = 0
        save(tmp_path / f"label/label{name}.nii.gz", label)
        save(tmp_path / f"p/img{name}.nii.gz", prediction)
    return tmp_path


def test_score_card_of_two_cases(two_cases, capsys):
    card = run(two_cases)
    rows = list(csv.DictReader(open(two_cases / "card/scores.csv")))
    assert len(rows) == 2 * 13 and len(card["classes"]) == 13
    by_key = {(row["case"], row["name"]): row for row in rows}
    assert by_key["img0036", "left kidney"]["status"] == "absent" and by_key["img0036", "left kidney"]["dice"] == ""
    assert by_key["img0036", "right kidney"]["status"] == "false positive"
    assert by_key["img0036", "spleen"]["status"] == "missed" and float(by_key["img0036", "spleen"]["nsd"]) == 0
    diagonal = np.linalg.norm(np.array([30, 28, 26]) * [2, 2, 3])
    assert float(by_key["img0036", "spleen"]["hd95"]) == pytest.approx(diagonal)
    assert card["counts"] == {"present": 24, "missed": 1, "false_positives": 1, "absent": 1}
    dice = [[float(r["dice"]) for r in rows if r["case"] == case and r["dice"]] for case in ("img0035", "img0036")]
    assert card["mean"]["dice"]["mean"] == pytest.approx(np.mean([np.mean(values) for values in dice]))
    low, high = card["mean"]["dice"]["ci95"]
    assert low <= card["mean"]["dice"]["mean"] <= high
    text = capsys.readouterr().out
    assert "right adrenal gland" in text and "rule: " in text and "predictions.json: it is unknown how" in text
    assert (two_cases / "card/dice.png").stat().st_size > 5000
    assert [p.name for p in sorted((two_cases / "card/worst").iterdir())] == ["1-img0036.png", "2-img0035.png"]


def test_scores_do_not_depend_on_flipped_axes(two_cases):
    before = run(two_cases)["mean"]
    label = two_cases / "label/label0036.nii.gz"
    # 4D with one channel is a volume
    save(label, np.asarray(nib.load(label).dataobj)[..., None])
    path = two_cases / "p/img0035.nii.gz"
    nib.save(nib.as_closest_canonical(nib.load(path)), path)
    assert run(two_cases)["mean"] == before


def test_notes_name_label_authors_leaks_and_selection(two_cases):
    (two_cases / "dataset.json").write_text(json.dumps({"labels_by": "a model (X), not experts"}))
    member = {"checkpoint": "c.pth", "sha256": "0" * 64, "selected": "best", "fold": 1, "init": "x.pth", "leak": "seen"}
    protocol = {"checkpoints": [member], "overlap": 0.5, "blending": "gaussian", "flips": False, "cases": []}
    (two_cases / "p/predictions.json").write_text(json.dumps(protocol))
    card = run(two_cases)
    assert card["protocol"]["overlap"] == 0.5 and card["protocol"]["checkpoints"] == [member]
    text = "\n".join(card["notes"])
    for note in ("a model (X), not experts", "LEAK in fold 1, c.pth: seen", "c.pth was picked by validation"):
        assert note in text
    assert re.search("2 case.* not made by this prediction: img0035, img0036", text)
    found = {"cases": ["img0035", "img0036"], "failed": ["img0037"], "trained_on": ["img0036", "img0001"]}
    (two_cases / "p/predictions.json").write_text(json.dumps(protocol | found | {"preset": "WORD"}))
    text = "\n".join(run(two_cases)["notes"])
    assert re.search("1 case.* could not be predicted.*: img0037", text) and "preset WORD" in text
    assert re.search("1 case.* TRAINED the network: img0036", text) and "not made by" not in text


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


def test_folds_are_pooled_and_each_case_counts_once(two_cases):
    together = run(two_cases)
    (two_cases / "q").mkdir()
    (two_cases / "p/img0036.nii.gz").rename(two_cases / "q/img0036.nii.gz")
    flags = ["--predictions", two_cases / "p", two_cases / "q", "--labels", two_cases / "label", "--preset", "BTCV"]
    main([*map(str, flags), "--out", str(two_cases / "folds")])
    assert json.loads((two_cases / "folds/scores.json").read_text())["mean"] == together["mean"]
    for folder, overlap in (("p", 0.5), ("q", 0.25)):
        content = {"checkpoints": [], "cases": ["img0035", "img0036"], "overlap": overlap, "flips": True}
        (two_cases / folder / "predictions.json").write_text(json.dumps(content))
    main([*map(str, flags), "--out", str(two_cases / "folds")])
    card = json.loads((two_cases / "folds/scores.json").read_text())
    assert "overlap" not in card["protocol"] and card["protocol"]["flips"] is True
    assert any("different settings: overlap" in note for note in card["notes"])
    (two_cases / "q/img0035.nii.gz").write_bytes((two_cases / "p/img0035.nii.gz").read_bytes())
    with pytest.raises(InputError, match="img0035 also in"):
        main([*map(str, flags), "--out", str(two_cases / "folds")])


def test_compare_is_paired_by_case(two_cases, capsys):
    run(two_cases, out="a")
    # b is a perfect prediction
    for path in (two_cases / "p").glob("*.nii.gz"):
        save(path, np.asarray(nib.load(two_cases / f"label/label{path.name[3:]}").dataobj))
    run(two_cases, out="b")
    main(["--compare", str(two_cases / "a"), str(two_cases / "b"), "--out", str(two_cases / "ab")])
    result = json.loads((two_cases / "ab/compare.json").read_text())
    a = json.loads((two_cases / "a/scores.json").read_text())
    assert result["metrics"]["dice"]["difference"] == pytest.approx(1 - a["mean"]["dice"]["mean"])
    assert result["metrics"]["dice"]["b_higher"] == 2 and result["metrics"]["hd95"]["difference"] < 0
    # a false positive in a, absent in b: no pair
    assert result["classes"]["right kidney"]["one_sided"] == 1
    text = capsys.readouterr().out
    assert re.search("mean HD95 .*b better in 2 of 2", text)
    assert re.search("right kidney .*b better in 1 of 1, 1 with a value in one only", text)
    assert not result["labels_differ_in"]
    compare_with(two_cases, "c", change_a_label)
    assert re.search("reference labels differ.* img0036", capsys.readouterr().out)
    with pytest.raises(InputError, match="d: not a readable score card"):
        compare_with(two_cases, "d", lambda folder: None, "[]")
    with pytest.raises(InputError, match="not the same cases"):
        compare_with(two_cases, "e", lambda folder: (folder / "p/img0036.nii.gz").unlink())


def change_a_label(folder):
    path = folder / "label/label0036.nii.gz"
    label = np.asarray(nib.load(path).dataobj)
    save(path, np.where(label == 6, 1, label))


def compare_with(folder, out, change, content=None):
    """Compare card a with another one after a change of the files, or with other content of its scores.json."""
    change(folder)
    run(folder, out=out)
    if content:
        (folder / out / "scores.json").write_text(content)
    main(["--compare", str(folder / "a"), str(folder / out), "--out", str(folder / "compared")])


def test_pairing_removes_differences_between_cases():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.3, 0.9, 20)
    row = difference([(h, h + 0.02 + rng.normal(0, 0.005)) for h in hard])
    # without pairs the spread of the cases would hide the difference
    assert row["ci95"][0] > 0.01 and row["ci95"][1] < 0.03


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
