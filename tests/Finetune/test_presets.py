"""Presets: their values, and what is refused in a YAML."""

import pytest
import yaml

from common.errors import InputError
from Finetune.presets import DATASETS, available, load_preset

# name: classes, spacing, (intensity, low, high), roi, (flip, rotate90, shift)
TABLE = {
    "BTCV": (14, (1.5, 1.5, 2.0), ("window", -175, 250), (96, 96, 96), (0.1, 0.1, 0.5)),
    "BTCV_iso": (14, (1.5, 1.5, 1.5), ("window", -175, 250), (96, 96, 96), (0.1, 0.1, 0.5)),
    "MMWHS_CT": (8, (1.5, 1.5, 1.5), ("window", 0, 1700), (96, 96, 96), (0, 0, 0)),
    "MSD09_Spleen": (2, (1.5, 1.5, 1.5), ("window", -175, 250), (96, 96, 96), (0.5, 0.25, 0.5)),
    "AMOS22_CT": (16, (1.5, 1.5, 2.0), ("window", -175, 250), (96, 96, 96), (0.5, 0.5, 0.5)),
    "FLARE22": (14, (1.5, 1.5, 2.0), ("window", -175, 250), (96, 96, 96), (0.2, 0.2, 0.1)),
    "WORD": (17, (1.5, 1.5, 1.5), ("window", -175, 250), (96, 96, 96), (0.5, 0.5, 0.5)),
    "MSD03_Liver": (3, (1.0, 1.0, 1.0), ("window", -21, 189), (96, 96, 96), (0.2, 0.2, 0.1)),
    "MSD06_Lung": (2, (1.0, 1.0, 1.0), ("window", -1000, 1000), (96, 96, 96), (0.5, 0.3, 0.1)),
    "MSD07_Pancreas": (3, (1.5, 1.5, 1.5), ("window", -87, 199), (96, 96, 96), (0.5, 0.25, 0.5)),
    "MSD08_HepaticVessel": (3, (1.5, 1.5, 1.5), ("window", 0, 230), (96, 96, 96), (0.5, 0.25, 0.5)),
    "MSD10_Colon": (2, (1.5, 1.5, 1.5), ("window", -57, 175), (96, 96, 96), (0.5, 0.25, 0.5)),
    "COVID19_20": (2, (1.25, 1.25, 5.0), ("window", -1000, 500), (192, 192, 32), (0.5, 0, 0)),
    "MSD01_BrainTumour": (4, (1.0, 1.0, 1.0), ("zscore", -175, 250), (128, 128, 128), (0.5, 0, 0.1)),
    "CC_CCII": (3, None, ("percentiles", 0, 100), (384, 384, 32), (0.5, 0, 0)),
    "MSD04_Hippocampus": (3, (1.0, 1.0, 1.0), ("percentiles", 0.5, 99.5), (48, 48, 48), (0.5, 0, 0.1)),
    "sample_abdomen": (14, (3.0, 3.0, 3.0), ("window", -175, 250), (64, 64, 64), (0, 0, 0.5)),
}


def test_every_row_of_the_table_has_its_yaml():
    assert set(available()) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_values(name):
    preset = load_preset(name)
    classes, spacing, intensity, roi, probabilities = TABLE[name]
    assert preset.name == name and len(preset.labels) == classes
    assert preset.spacing == spacing and preset.roi == roi
    assert (preset.intensity, preset.low, preset.high) == intensity
    a = preset.augmentation
    assert (a.flip, a.rotate90, a.shift_intensity) == probabilities
    assert preset.preprocessing.spacing == spacing


def test_overlapping_regions_of_brain_tumours():
    preset = load_preset("MSD01_BrainTumour")
    assert preset.out_channels == 3 and preset.channels == 4
    assert list(preset.scored().values()) == [(2, 3), (1, 2, 3), (3,)]
    assert load_preset("MSD03_Liver").scored() == {"liver": (1,), "tumour": (2,)}


def test_hippocampi_are_flipped_left_to_right_only():
    assert load_preset("MSD04_Hippocampus").augmentation.flip_axes == (0,)
    assert load_preset("BTCV").augmentation.flip_axes == (0, 1, 2)


def custom(tmp_path, **changes):
    content = yaml.safe_load((DATASETS / "MSD09_Spleen.yaml").read_text()) | changes
    path = tmp_path / "custom.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value != "removed"}))
    return path


def test_a_custom_yaml(tmp_path):
    assert load_preset(custom(tmp_path, name="mine", roi=[64, 64, 32])).roi == (64, 64, 32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"spacng": [1, 1, 1]}, "'spacng'.*'spacing'"),
        ({"augmentation": {"flips": 0.5}}, "augmentation.*'flips'.*'flip'"),
        ({"roi": "removed"}, "missing setting.*roi"),
        ({"roi": [96, 96, 90]}, r"roi.*96, 90.*16, 16, 16"),
        ({"intensity": "windows"}, "intensity.*'windows'.*window, percentiles, zscore"),
        ({"labels": {0: "background", 2: "spleen"}}, r"labels.*\[0, 2\]"),
        ({"low": 300}, "low.*300.*250"),
        ({"label_values": {0: 0, 205: 7}}, r"label_values.*\[0, 7\].*\[0, 1\]"),
        ({"augmentation": {"flip_axes": [0, 3]}}, r"augmentation: flip_axes.*3.*at most 2"),
        ({"augmentation": {"flip_axes": [1, 1]}}, r"augmentation: flip_axes.*1, 1.*once"),
        ({"augmentation": {"gamma_range": [2, 1]}}, r"augmentation: gamma_range.*2.*1.*first"),
        ({"augmentation": {"flip": 5}}, "augmentation: flip 5.*at most 1"),
        ({"spacing": "two"}, "spacing.*'two'"),
        ({"layout": {"images": ["img/*.nii.gz"], "labels": ["label/*.nii.gz"]}}, "case"),
        ({"layout": {}}, "layout.*datalist.*images"),
        ({"labels": {0: "background", 1: "spleen", 2: "spleen"}}, "labels.*'spleen' twice"),
        ({"regions": {"organ": []}}, "regions.*'organ'"),
        ({"roi": [96, 96, 0]}, "roi 96 96 0.*at least 1"),
        ({"spacing": [1, 0, 1]}, "spacing 1 0 1.*more than 0"),
        ({"intensity": "percentiles", "low": -1, "high": 99}, "low, high.*-1.*99"),
        ({"channels": 0}, "channels 0.*at least 1"),
        ({"folds": 1}, "folds 1.*at least 2"),
        ({"validation_cases": 0}, "validation_cases 0.*at least 1"),
        ({"nsd_tolerance": -1}, "nsd_tolerance -1.*at least 0"),
        (
            {"layout": {"datalist": "d.json", "case": "(["}},
            r"layout: case.*'\(\['.*regular expression",
        ),
        ({"layout": {"datalist": "d.json", "patient": "*"}}, r"layout: patient.*'\*'"),
        (
            {"task": "classification", "layout": {"images": ["A/{case}.nii.gz"], "classes": {"A": 7}}},
            r"layout: classes.*\[7\].*\[0, 1\]",
        ),
    ],
)
def test_a_wrong_yaml_is_refused_with_file_and_key(tmp_path, changes, words):
    path = custom(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as caught:
        load_preset(path)
    assert str(path) in str(caught.value)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(InputError, match="BTCVV.*did you mean 'BTCV'"):
        load_preset("BTCVV")
    with pytest.raises(InputError, match="nowhere.yaml"):
        load_preset("nowhere.yaml")
