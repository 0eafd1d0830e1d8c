"""Probes: they find labels that are in the features and none in noise, choose on development cases only, and repeat."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from Finetune import probe
from Finetune.evaluation import features, probes
from Finetune.evaluation.features import Features, tile_starts, to_patches
from Finetune.evaluation.probes import HeldOut, ProbeTask, Standardize, run_probe, to_voxels
from Finetune.heads import Architecture
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Finetune.presets import load_preset
from tests.Finetune.made import make_scans, volume
from tests.helpers import write_nifti

PRESET, REGIONS, CLASSES = (load_preset(name) for name in ("MSD09_Spleen", "MSD01_BrainTumour", "CC_CCII"))
ROI, PATCH = (8, 8, 8), (2, 2, 2)
VIT = "--embed_dim 24 --depth 2 --num_heads 2 --patch_size 16 --roi 32 32 32".split()
QUICK = "--updates 4 --batch_size 2 --learning_rates 1e-3,1e-2 --neighbours 3".split()


def task_of(preset, **values) -> ProbeTask:
    sizes = dict(in_chans=1, out_channels=preset.out_channels, roi=ROI, patch_size=PATCH, feature_size=1, num_heads=2)
    architecture = Architecture(model="vit", **sizes, class_token=True)
    return replace(ProbeTask(preset, architecture, (0.003, 0.03), 60, 4, 5, 0), **values)


def drawn_maps(count: int, classes: int, seed: int) -> torch.Tensor:
    """Return label maps (count, 1, *ROI) of a class per patch, uint8. The share of the background varies."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(1, classes, (count, 1, 4, 4, 4), generator=rng)
    coarse *= torch.rand(count, 1, 4, 4, 4, generator=rng) < torch.linspace(0.1, 0.9, count).view(-1, 1, 1, 1, 1)
    return F.interpolate(coarse.float(), size=ROI, mode="nearest").byte()


def segmentation_part(classes: int, seed: int, informative: bool, count: int = 12) -> HeldOut:
    """Return crops, one per case: tokens of CLS and patches hold the labels and noise, or noise only."""
    maps = drawn_maps(count, classes, seed)
    targets = to_patches(maps, PATCH)
    tokens = torch.randn(count, 65, 8, generator=torch.Generator().manual_seed(seed + 100))
    if informative:
        one_hot = F.one_hot(targets[:, :, 0].long(), classes).float()
        angles = 3 * one_hot.mean(dim=1)
        tokens = tokens * 0.05
        tokens[:, 1:, :classes] += one_hot
        tokens[:, 0] += torch.cat([angles.cos(), angles.sin()], dim=1).repeat(1, 4 // classes)
    names = tuple(f"case{seed}-{number}" for number in range(count))
    return HeldOut(Features(tokens, targets, names, 1), dict(zip(names, maps[:, 0])))


def class_part(seed: int, informative: bool, count: int = 24) -> HeldOut:
    """Return crops of three classes."""
    targets = torch.arange(count) % 3
    tokens = torch.randn(count, 65, 8, generator=torch.Generator().manual_seed(seed))
    if informative:
        tokens = tokens * 0.1 + torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[targets][:, None]
    return HeldOut(Features(tokens, targets, tuple(f"{seed}-{n}" for n in range(count)), 1), {})


def outcomes(preset, informative: bool, classes: int):
    if preset.task == "classification":
        parts = [class_part(seed, informative) for seed in (1, 2, 3)]
    else:
        parts = [segmentation_part(classes, seed, informative) for seed in (1, 2, 3)]
    train, development, test = parts
    task = task_of(preset)
    return [outcome for name in probes.PROBES for outcome in run_probe(name, train.features, development, test, task)]


def average(values):
    return sum(values) / len(values)


# ---------------------------------------------------------------- the probes


@pytest.mark.parametrize("preset, classes", [(PRESET, 2), (REGIONS, 4)], ids=["classes", "regions"])
def test_labels_in_the_features_are_found(preset, classes):
    found = {o.probe: {m: average(v.values()) for m, v in o.test.items()} for o in outcomes(preset, True, classes)}
    assert set(found) == {"linear", "knn patches", "knn cls", "attentive"}
    assert min(found[name]["Dice"] for name in ("linear", "knn patches", "attentive")) > 0.97
    assert found["knn cls"]["R2"] > 0.3


def test_noise_is_not_better_than_chance():
    found = {o.probe: {m: average(v.values()) for m, v in o.test.items()} for o in outcomes(PRESET, False, 2)}
    assert all(found[name]["Dice"] < 0.6 for name in ("linear", "knn patches", "attentive"))
    assert found["knn cls"]["R2"] < 0.2


def test_classes_are_found_and_noise_is_not():
    for informative in (True, False):
        for outcome in outcomes(CLASSES, informative, 3):
            accuracy, balanced = (average(outcome.test[name].values()) for name in ("accuracy", "balanced accuracy"))
            assert accuracy == pytest.approx(balanced)
            assert accuracy > 0.9 if informative else accuracy < 0.7


def test_balanced_accuracy_weighs_classes_equally():
    targets = torch.tensor([0, 0, 0, 1])
    part = HeldOut(Features(torch.zeros(4, 1, 2), targets, ("a", "b", "c", "d"), 1), {})
    scores = probes.score_classes(lambda x: torch.eye(3)[[0, 0, 0, 0]], part.features, part, task_of(CLASSES))
    assert average(scores["accuracy"].values()) == 0.75
    assert average(scores["balanced accuracy"].values()) == pytest.approx(0.5)


def test_r2_is_that_of_the_definition():
    train, _, test = (segmentation_part(2, seed, True) for seed in (1, 2, 3))
    task = task_of(PRESET)
    truth, guess = probes.class_shares(test.features, task)[:, 1], torch.rand(12)
    scores = probes.score_shares(lambda x: torch.stack([1 - guess, guess], dim=1), train.features, test, task)
    baseline = probes.class_shares(train.features, task)[:, 1].mean()
    expected = 1 - (guess - truth).square().sum() / (baseline - truth).square().sum()
    assert average(scores["R2"].values()) == pytest.approx(float(expected), rel=1e-5)


def test_test_cases_do_not_choose_the_learning_rate(monkeypatch):
    development, test = (segmentation_part(2, seed, True) for seed in (1, 2))
    seen = []

    def score(predict, train, part, task):
        seen.append((predict, part is test))
        # on the development cases the second head is better, on the test cases the first
        return {"Dice": {"a": float((predict == "second") != (part is test))}}

    fit = lambda train, task: {0.1: "first", 0.2: "second"}  # noqa: E731
    monkeypatch.setitem(probes.PROBES, "linear", lambda task: [("linear", fit, score)])
    (outcome,) = run_probe("linear", development.features, development, test, task_of(PRESET))
    assert outcome.rate == 0.2 and outcome.by_rate == {0.1: 0.0, 0.2: 1.0} and outcome.test == {"Dice": {"a": 0.0}}
    assert [predict for predict, on_test in seen if on_test] == ["second"]


def test_neighbours_vote_as_in_a_plain_loop(monkeypatch):
    monkeypatch.setattr(probes, "CHUNK", 4096)
    train, test = (segmentation_part(2, seed, False, count=2) for seed in (1, 2))
    task = task_of(PRESET)
    found = probes.fit_patch_neighbours(train.features, task)[None](test.features.tokens)
    mean, std = train.features.patches.mean(dim=(0, 1)), train.features.patches.std(dim=(0, 1), correction=0)
    bank, queries = ((part.features.patches.flatten(0, 1) - mean) / std for part in (train, test))
    labels = train.features.targets.flatten(0, 1)
    for number in (0, 70, 127):
        similarity = F.cosine_similarity(queries[number, None], bank)
        weights, rows = similarity.topk(5)
        weights = (weights / 0.07).softmax(dim=0)
        expected = sum(w * labels[row].float() for w, row in zip(weights, rows))
        patches = to_patches(found[:, 1:], PATCH).flatten(0, 1)
        torch.testing.assert_close(patches[number], expected, atol=1e-4, rtol=0)


def test_standardised_training_features_have_unit_variance():
    x = torch.randn(5, 9, 4) * 3 + 2
    x[:, 0] += 100
    y = Standardize(x, prefix=1)(x)
    torch.testing.assert_close(y[:, 1:].flatten(0, 1).mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[:, 1:].flatten(0, 1).std(dim=0, correction=0), torch.ones(4))
    torch.testing.assert_close(y[:, 0].mean(dim=0), torch.zeros(4), atol=1e-4, rtol=0)
    # a constant channel is not divided by nearly nothing
    assert Standardize(torch.ones(2, 3, 4))(torch.ones(2, 3, 4)).abs().max() == 0


# ---------------------------------------------------------------- crops and features


@pytest.mark.parametrize("shape", [(35, 50, 36), (8, 7, 20), (3, 3, 3)])
def test_crops_cover_every_voxel(shape):
    covered = torch.zeros(shape)
    for start in tile_starts(shape, ROI):
        box = tuple(slice(max(first, 0), first + size) for first, size in zip(start, ROI))
        covered[box] = 1
        centred = [-((size - have) // 2) for have, size in zip(shape, ROI)]
        assert all(have >= size or first == middle for have, size, first, middle in zip(shape, ROI, start, centred))
    assert covered.all()


def test_patches_are_put_together_again():
    maps = torch.randint(255, (2, 1, 4, 8, 6)).byte()
    architecture = replace(task_of(PRESET).architecture, roi=(4, 8, 6), patch_size=(2, 4, 3))
    assert torch.equal(to_voxels(to_patches(maps, (2, 4, 3)), architecture), maps)


@pytest.mark.parametrize("class_token", [True, False])
def test_tokens_are_those_after_the_norm(class_token):
    vit = VisionTransformer3D(32, 16, embed_dim=24, depth=2, num_heads=2, class_token=class_token)
    crops = torch.rand(2, 1, 32, 32, 32)
    tokens = features.token_reader(vit, torch.device("cpu"))(crops)
    expected = vit(crops, return_features=True)
    torch.testing.assert_close(tokens, expected["all_features"])
    torch.testing.assert_close(features.summary_of(tokens, vit.num_prefix_tokens), expected["cls_token"])
    hybrid = ConvViT3D(32, embed_dims=(8, 8, 8, 12), depths=(1, 1, 1, 1), num_heads=2)
    torch.testing.assert_close(features.token_reader(hybrid, torch.device("cpu"))(crops), hybrid.eval()(crops))


# ---------------------------------------------------------------- the program


def test_a_learning_rate_at_an_end_of_the_list_is_noted():
    rows = [
        {"probe": "linear", "init": "random", "labels": 3, "learning_rate": rate} for rate in (0.1, 0.1, 0.01, None)
    ]
    expected = ["linear, random, 3 labels: 0.1 is the highest of --learning_rates"]
    assert probe.rate_notes(rows, (0.001, 0.01, 0.1)) == expected
    assert probe.rate_notes(rows, (0.1,)) == []


@pytest.fixture(scope="module")
def spleen(tmp_path_factory):
    """A data set of three training cases and four held-out ones, with a checkpoint beside it."""
    root, entries = tmp_path_factory.mktemp("probe"), []
    for number in range(7):
        image, label = volume(PRESET, number)
        write_nifti(root / f"imagesTr/c{number}.nii.gz", image, PRESET.spacing)
        write_nifti(root / f"labelsTr/c{number}.nii.gz", label, PRESET.spacing)
        files = {"image": f"./imagesTr/c{number}.nii.gz", "label": f"./labelsTr/c{number}.nii.gz"}
        entries.append(files | {"fold": int(number >= 4)})
    (root / "dataset.json").write_text(json.dumps({"training": entries}))
    for name in ("a", "b"):
        vits = [VisionTransformer3D(32, 16, embed_dim=24, depth=2, num_heads=2).state_dict() for _ in range(2)]
        torch.save({"student": vits[0], "teacher": vits[1], "args": {"num_heads": 2}}, root / f"{name}.pth")
    return root


def run(data, out, *extra, preset=PRESET.name):
    flags = ["--preset", preset, "--data", data, "--cache_dir", data / "cache", "--out", out, *QUICK]
    probe.main([*map(str, flags), *map(str, extra)])
    return json.loads((out / "probe.json").read_text())


def test_encoders_are_compared_with_random_ones(tmp_path, spleen):
    inits = f"one={spleen}/a.pth,two={spleen}/a.pth:{spleen}/b.pth@teacher"
    flags = ["--inits", inits, "--seeds", "0,5", "--label_counts", "1,all", "--crops_per_volume", 1]
    flags += ["--roi", *"32 32 32".split()]
    result = run(spleen, tmp_path / "first", *flags)
    assert len(result["rows"]) == 4 * 3 * 2 * 2
    groups = [(row["probe"], row["init"], row["labels"]) for row in result["summaries"]]
    assert len(set(groups)) == 24 and {init for _, init, _ in groups} == {"random", "one", "two"}
    assert not set(result["development_cases"]) & set(result["test_cases"]) and len(result["test_cases"]) == 2
    for row in result["summaries"]:
        assert (row["minus_random"] is None) == (row["init"] == "random")
    # without training, the numbers of a file differ between its seeds through the training cases alone
    knn = {(r["init"], r["seed"]): r["test"] for r in result["rows"] if r["probe"] == "knn cls" and r["labels"] == 3}
    assert knn["one", 0] == knn["one", 5] and knn["random", 0] != knn["random", 5]
    assert len({knn["one", 0], knn["two", 0], knn["two", 5]}) == 3
    table = (tmp_path / "first/probe.txt").read_text()
    assert "minus random" in table and "knn cls" in table and "note: one: " in table
    # the same numbers again, whatever else a command asks for
    again = run(spleen, tmp_path / "second", *flags[4:], "--inits", f"one={spleen}/a.pth", "--seeds", "0")
    assert len(again["rows"]) == 4 * 2 * 2
    assert again["rows"] == [row for row in result["rows"] if row["seed"] == 0 and row["init"] != "two"]


def test_hybrid_encoder_has_its_own_random_twin(tmp_path, spleen):
    sizes = dict(in_chans=1, embed_dims=(8, 8, 8, 12), depths=(1, 1, 1, 1), num_heads=2)
    torch.save({"model": ConvViT3D(32, **sizes).state_dict(), "args": {"num_heads": 2}}, tmp_path / "mim.pth")
    flags = ["--seeds", 0, "--roi", *"32 32 32".split(), "--probes", "linear,knn"]
    result = run(spleen, tmp_path / "out", *flags, "--inits", f"mim={tmp_path}/mim.pth,vit={spleen}/a.pth")
    assert [init["name"] for init in result["inits"]] == ["random (mim)", "random (vit)", "mim", "vit"]
    assert {row["probe"] for row in result["rows"] if row["init"] == "mim"} == {"linear", "knn patches", "knn mean"}
    alone = run(spleen, tmp_path / "alone", *flags, "--encoder", "hybrid", "--size", "tiny")
    assert {row["init"] for row in alone["rows"]} == {"random"}


def test_classification_is_scored_by_accuracy(tmp_path):
    data = make_scans(CLASSES, tmp_path / "scans")
    flags = [*VIT[:-3], "32", "32", "16", "--seeds", 0, "--no-class_token", "--amp", "bf16"]
    result = run(data, tmp_path / "out", *flags, preset="CC_CCII")
    found = {(row["probe"], row["metric"]) for row in result["rows"]}
    assert found == {(p, m) for p in ("linear", "knn mean", "attentive") for m in ("accuracy", "balanced accuracy")}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--probes", "liner"], "--probes liner: .*did you mean 'linear'"),
        (["--learning_rates", "0"], "--learning_rates 0"),
        (["--learning_rates", "fast"], "--learning_rates.*'fast'"),
        (["--seeds", "x"], "--seeds.*'x'"),
        (["--label_counts", "9"], "label_count 9: must be 1 to 3"),
        (["--inits", "mae.pth"], "--inits: found 'mae.pth', expected random or NAME=FILE"),
        (["--inits", "random=mae.pth"], "--inits.*'random'"),
        (["--inits", "a=DATA/nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["--inits", "a=DATA/a.pth,a=DATA/b.pth"], "--inits.*'a' twice"),
        (["--inits", "a=DATA/dataset.json"], "dataset.json: not a checkpoint"),
        (["--inits", "a=DATA/a.pth@momentum"], "a.pth.*'momentum'"),
        (["--inits", "a=DATA/a.pth", "--depth", "3"], "a.pth: found an encoder with depth 2, expected 3"),
        (["--inits", "a=DATA/a.pth", "--encoder", "hybrid"], "a.pth.*hybrid"),
        (["--patch_size", "5"], "--roi .*patch size 5 5 5"),
        (["--embed_dim", "4", "--num_heads", "2"], "embed_dim"),
        (["--fold", "7"], "--fold 7"),
    ],
)
def test_wrong_settings_are_refused_before_work(tmp_path, spleen, monkeypatch, flags, message):
    monkeypatch.setattr(probe, "load_volumes", lambda *_: pytest.fail("the cache was filled"))
    with pytest.raises(InputError, match=message):
        run(spleen, tmp_path / "out", *(word.replace("DATA", str(spleen)) for word in flags))
    assert not (tmp_path / "out").exists()


def test_a_fold_of_one_case_is_refused(tmp_path, spleen):
    listing = json.loads((spleen / "dataset.json").read_text())
    for number, case in enumerate(listing["training"]):
        case["fold"] = int(number > 0)
    (spleen / "one.json").write_text(json.dumps(listing))
    flags = ["--preset", PRESET.name, "--data", spleen / "one.json", "--out", tmp_path, *VIT]
    with pytest.raises(InputError, match="--fold 0: has 1 case"):
        probe.main(list(map(str, flags)))
