"""The score card from files: pairing, geometry, rules, notes, comparison, pictures."""

import csv
import gzip
import json

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


def run(tmp_path, *extra, preset="BTCV", out="card"):
    flags = [
        "--predictions",
        tmp_path / "p",
        "--labels",
        tmp_path / "label",
        "--preset",
        preset,
        "--out",
        tmp_path / out,
    ]
    main([*map(str, flags), *map(str, extra)])
    return json.loads((tmp_path / out / "scores.json").read_text())


@pytest.fixture
def two_cases(tmp_path):
    """Two BTCV cases; the second has no kidneys, and its prediction misses the spleen and invents a kidney."""
    for number, name in enumerate(("0035", "0036")):
        _, label = volume(load_preset("BTCV"), number)
        prediction = np.roll(label, 1, axis=1)
        if number:
            label[(label == 2) | (label == 3)] = 0
            prediction[(prediction == 1) | (prediction == 3)] = 0
        save(tmp_path / f"label/label{name}.nii.gz", label)
        save(tmp_path / f"p/img{name}.nii.gz", prediction)
    return tmp_path


def test_card_of_two_cases(two_cases, capsys):
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
    dice = {
        case: [float(r["dice"]) for r in rows if r["case"] == case and r["dice"]] for case in ("img0035", "img0036")
    }
    assert card["mean"]["dice"]["mean"] == pytest.approx(np.mean([np.mean(v) for v in dice.values()]))
    low, high = card["mean"]["dice"]["ci95"]
    assert low <= card["mean"]["dice"]["mean"] <= high
    text = capsys.readouterr().out
    assert "right adrenal gland" in text and "rule: " in text and "how its label maps were made is not known" in text
    assert (two_cases / "card/dice.png").stat().st_size > 5000
    assert [p.name for p in sorted((two_cases / "card/worst").iterdir())] == ["1-img0036.png", "2-img0035.png"]


def test_flipped_axes_of_a_file_do_not_matter(two_cases):
    before = run(two_cases)["mean"]
    label = two_cases / "label/label0036.nii.gz"
    save(label, np.asarray(nib.load(label).dataobj)[..., None])  # 4D with one channel is a volume
    path = two_cases / "p/img0035.nii.gz"
    nib.save(nib.as_closest_canonical(nib.load(path)), path)
    assert run(two_cases)["mean"] == before


def test_the_card_says_who_made_labels_and_choices(two_cases):
    (two_cases / "dataset.json").write_text(json.dumps({"labels_by": "a model (X), not experts"}))
    member = {
        "checkpoint": "c.pth",
        "sha256": "0" * 64,
        "selected": "best",
        "fold": 1,
        "init": "x.pth",
        "leak": "seen before",
    }
    protocol = {"checkpoints": [member], "overlap": 0.5, "blending": "gaussian", "flips": False, "cases": []}
    (two_cases / "p/predictions.json").write_text(json.dumps(protocol))
    card = run(two_cases)
    assert any("a model (X), not experts" in note for note in card["notes"])
    assert any("LEAK in fold 1, c.pth: seen before" in note for note in card["notes"])
    assert any("picked by validation" in note for note in card["notes"])
    assert card["protocol"]["overlap"] == 0.5 and card["protocol"]["checkpoints"] == [member]
    assert any(
        "2 case(s) in " in note and "are not of this prediction: img0035, img0036" in note for note in card["notes"]
    )
    found = {
        "cases": ["img0035", "img0036"],
        "failed": ["img0037"],
        "trained_on": ["img0036", "img0001"],
        "preset": "WORD",
    }
    (two_cases / "p/predictions.json").write_text(json.dumps(protocol | found))
    text = "\n".join(run(two_cases)["notes"])
    assert "1 case(s) could not be predicted, and are in no mean: img0037" in text
    assert "1 case(s) TRAINED the network: img0036" in text and "predicted by a network for preset WORD" in text
    assert "not of this prediction" not in text


def test_labels_may_be_a_list_and_then_what_is_missing_is_said(two_cases):
    before = run(two_cases)["mean"]
    entries = [
        {"name": f"img{n}", "image": f"x/img{n}.nii.gz", "label": f"label/label{n}.nii.gz"}
        for n in ("0035", "0036", "0037")
    ]
    (two_cases / "list.json").write_text(json.dumps({"training": entries, "labels_by": "students"}))
    card = run(two_cases, "--labels", two_cases / "list.json")
    assert card["mean"] == before and card["protocol"]["labels_by"] == "students"
    assert any("1 case(s) of" in note and "are in no mean: img0037" in note for note in card["notes"])
    (two_cases / "list.json").write_text(json.dumps({"training": entries[:1]}))
    with pytest.raises(InputError, match="img0036.nii.gz: found no label for it"):
        run(two_cases, "--labels", two_cases / "list.json")


def test_folds_are_pooled_and_no_case_counts_twice(two_cases):
    whole = run(two_cases)
    (two_cases / "q").mkdir()
    (two_cases / "p/img0036.nii.gz").rename(two_cases / "q/img0036.nii.gz")
    flags = ["--predictions", two_cases / "p", two_cases / "q", "--labels", two_cases / "label", "--preset", "BTCV"]
    main([*map(str, flags), "--out", str(two_cases / "folds")])
    assert json.loads((two_cases / "folds/scores.json").read_text())["mean"] == whole["mean"]
    for folder, overlap in (("p", 0.5), ("q", 0.25)):
        content = {"checkpoints": [], "cases": ["img0035", "img0036"], "overlap": overlap, "flips": True}
        (two_cases / folder / "predictions.json").write_text(json.dumps(content))
    main([*map(str, flags), "--out", str(two_cases / "folds")])
    card = json.loads((two_cases / "folds/scores.json").read_text())
    assert "overlap" not in card["protocol"] and card["protocol"]["flips"] is True
    assert any("not made alike: they differ in overlap" in note for note in card["notes"])
    (two_cases / "q/img0035.nii.gz").write_bytes((two_cases / "p/img0035.nii.gz").read_bytes())
    with pytest.raises(InputError, match="img0035 is in .* as well"):
        main([*map(str, flags), "--out", str(two_cases / "folds")])


def test_compare_is_paired_by_case(two_cases, capsys):
    run(two_cases, out="a")
    for path in (two_cases / "p").glob("*.nii.gz"):  # b is a perfect prediction
        save(path, np.asarray(nib.load(two_cases / f"label/label{path.name[3:]}").dataobj))
    run(two_cases, out="b")
    main(["--compare", str(two_cases / "a"), str(two_cases / "b"), "--out", str(two_cases / "ab")])
    result = json.loads((two_cases / "ab/compare.json").read_text())
    a = json.loads((two_cases / "a/scores.json").read_text())
    assert result["metrics"]["dice"]["difference"] == pytest.approx(1 - a["mean"]["dice"]["mean"])
    assert result["metrics"]["dice"]["b_higher"] == 2 and result["metrics"]["hd95"]["difference"] < 0
    assert result["classes"]["right kidney"]["one_sided"] == 1  # a false positive in a, absent in b: no pair
    text = capsys.readouterr().out
    assert "b higher in 2 of 2" in text and "b higher in 1 of 1, 1 with a value in one only" in text
    assert not result["labels_differ_in"]
    reference = two_cases / "label/label0036.nii.gz"
    save(reference, np.where(np.asarray(nib.load(reference).dataobj) == 6, 1, np.asarray(nib.load(reference).dataobj)))
    run(two_cases, out="other")
    main(["--compare", str(two_cases / "a"), str(two_cases / "other"), "--out", str(two_cases / "ab")])
    assert "note: the reference labels are not the same ones for img0036" in capsys.readouterr().out
    (two_cases / "other/scores.json").write_text("[]")
    with pytest.raises(InputError, match="other: its score card cannot be read"):
        main(["--compare", str(two_cases / "a"), str(two_cases / "other"), "--out", str(two_cases / "ab")])
    (two_cases / "p/img0036.nii.gz").unlink()
    run(two_cases, out="c")
    with pytest.raises(InputError, match="not the same cases"):
        main(["--compare", str(two_cases / "a"), str(two_cases / "c"), "--out", str(two_cases / "ac")])


def test_pairing_removes_what_cases_have_in_common():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.3, 0.9, 20)
    row = difference([(h, h + 0.02 + rng.normal(0, 0.005)) for h in hard])
    assert row["ci95"][0] > 0.01 and row["ci95"][1] < 0.03  # unpaired it would be lost in the spread of cases


def test_bad_input(two_cases):
    label = np.asarray(nib.load(two_cases / "label/label0035.nii.gz").dataobj)
    save(two_cases / "p/img0035.nii.gz", label[:-1])
    with pytest.raises(InputError, match=r"img0035.nii.gz: found the shape \(29, 28, 26\), its label .*\(30, 28, 26\)"):
        run(two_cases)
    save(two_cases / "p/img0035.nii.gz", label, np.diag([-2.0, -2.0, 3.3, 1.0]))
    with pytest.raises(InputError, match="img0035.nii.gz: lies up to .* mm off its label"):
        run(two_cases)
    save(two_cases / "p/img0035.nii.gz", np.where(label == 1, 14, label))
    with pytest.raises(InputError, match="img0035.nii.gz: found the label value 14"):
        run(two_cases)
    (two_cases / "p/img0035.nii.gz").write_bytes(b"no nifti")
    with pytest.raises(InputError, match="img0035.nii.gz: .*Not a gzipped file"):
        run(two_cases)
    damaged = bytearray(gzip.compress(nib.Nifti1Image(label.astype(np.uint8), AFFINE).to_bytes(), mtime=0))
    damaged[200:260] = b"\xff" * 60  # nibabel reads this without a word, as other labels
    (two_cases / "p/img0035.nii.gz").write_bytes(damaged)
    with pytest.raises(InputError, match="img0035.nii.gz: .*CRC check failed"):
        run(two_cases)
    colours = np.zeros(label.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, AFFINE), two_cases / "p/img0035.nii.gz")
    with pytest.raises(InputError, match="img0035.nii.gz: found .*data"):
        run(two_cases)
    for extra, words in (
        (["--worst", "-1"], "worst: found -1"),
        (["--images", two_cases / "nowhere"], "images: found .*nowhere, needs a folder"),
        (["--labels", two_cases / "nowhere"], "nowhere: no such folder or list"),
        (["--preset", "CC_CCII"], "preset CC_CCII: is for classification"),
        (["--labels", two_cases / "p"], "img0035.nii.gz: found as its own label"),
    ):
        with pytest.raises(InputError, match=words):
            run(two_cases, *extra)
    for content in ("no json", "[]", '{"checkpoints": 3}', '{"checkpoints": [{}], "cases": []}'):
        (two_cases / "p/predictions.json").write_text(content)
        with pytest.raises(InputError, match="predictions.json: not as Finetune.predict writes it"):
            run(two_cases)
    (two_cases / "p/predictions.json").unlink()
    (two_cases / "label/label0035.nii.gz").unlink()
    with pytest.raises(InputError, match="img0035.nii.gz: found no label for it"):
        run(two_cases)
    for path in (two_cases / "p").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="found no label map"):
        run(two_cases)
    with pytest.raises(InputError, match="--labels: missing"):
        main(["--predictions", str(two_cases / "p"), "--out", str(two_cases / "x")])
    assert not list((two_cases / "card").iterdir())
