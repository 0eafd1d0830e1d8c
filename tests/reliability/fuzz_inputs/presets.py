"""Changed presets, lists of data sets and files of settings, all YAML."""

import json
import random
from pathlib import Path

import yaml

from tests.reliability.fuzz_inputs.bench import PRESET, Bench, Words, finetune_words, pretrain_words
from tests.reliability.fuzz_inputs.changes import change_entry, damaged, plain

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)


def changed_yaml(rng: random.Random, content: dict) -> bytes:
    """Return a YAML with values, keys or a structure that do not belong there."""
    kind = rng.randrange(10)
    if kind == 0:
        return damaged(rng, yaml.safe_dump(content).encode())
    if kind == 1:
        key = rng.choice(["labels", "roi", "spacing", "name", "layout", "validation", "regions"])
        depth = rng.choice([100, 900, 5000])
        bombs = [
            f"{BOMB}{key}: *i\n",
            f"{key}: &x [*x]\n",
            f"{key}: &x {{a: *x}}\n",
            f"{key}: {'[' * depth}{']' * depth}\n",
        ]
        others = [
            "!!python/object/apply:os.system ['touch ran']\n",
            "a: 1\n---\nb: 2\n",
            "- 1\n",
            "x",
            "",
            "? [1]\n: 2\n",
        ]
        text = yaml.safe_dump({k: v for k, v in content.items() if k != key})
        return (text * (rng.random() < 0.8) + rng.choice([*bombs, *bombs, *others])).encode()
    patterns = [
        "img/{case}.nii.gz",
        "/{case}.nii",
        "{case}",
        "../{case}/{case}.nii.gz",
        "**/{case}",
        "x",
        "[{case}",
        "",
    ]
    named = {"images": ["imagesTr/{case}.nii.gz"], "labels": ["labelsTr/{case}.nii.gz"]}
    extra = {
        "roi": [[10**9] * 3, [8] * 3, [16, 16], [24, 24, 24], [0, 8, 8], 16, [8000] * 3],
        "patch_size": [[1] * 3, [3] * 3, [16] * 3, [10**9] * 3, [4, 8, 16]],
        "labels": [{0: "a"}, {0: "a", 1: "a"}, {1: "b", 2: "c"}, {k: str(k) for k in range(300)}, {0: "", 1: ""}],
        "label_values": [{5: 1}, {0: 0, 1: 1, 2: 2, 3: 3}, {0: 0, 1: 9}, {2**40: 1}, {-1: 0, 0: 1, 1: 1, 2: 2, 3: 3}],
        "regions": [{"a": [1, 2], "b": [2]}, {"a": []}, {"a": [9]}, {"": [1]}, {"a/b": [1, 2]}],
        "spacing": [[1e-9] * 3, [0.001] * 3, [999] * 3, [1e300] * 3, [1, 1], [0.2, 8, 8], [30, 30, 30]],
        "channels": [2, 4, 10**9],
        "folds": [2, 3, 10**9, 2**63],
        "validation": [["c0"], ["c0", "c1", "c2"], ["x"], [""]],
        "validation_cases": [1, 2, 3, 10**9],
        "label_order": [["c0", "c0"], ["x"]],
        "intensity": ["zscore", "percentiles"],
        "low": [250, 1e300, -1e300, 249.9999999999999],
        "high": [-175, 1e300, 1e-300, 2**70],
        "foreground_threshold": [2, -1, 1e300, None],
        "nsd_tolerance": [0, 1e300, 1e-300],
        "task": ["classification"],
        "layout": [
            {"images": [rng.choice(patterns)], "labels": [rng.choice(patterns)]},
            named | {"case": rng.choice(["(", "(a+)+", "", ".*", "(?P<case>.)"])},
            {"datalist": rng.choice(["x.json", "/dev/zero", "..", "", "a\0b", "z" * 300, "imagesTr"])},
            {"datalist": "dataset.json", "patient": rng.choice(["", "c", "(", ".*"])},
        ],
        "augmentation": [{"flip": 2}, {"noise": 1}, {"x": 1}],
        "name": ["a/b", "", "x" * 5000, "a\0b"],
    }  # fmt: skip
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.6:
            key = rng.choice(list(extra))
            content[key] = rng.choice(extra[key])
        else:
            change_entry(rng, content)
    return yaml.safe_dump(plain(content), allow_unicode=True).encode(errors="replace")


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A preset, a list of data sets or a file of settings: values, keys, nesting, references; read, trained, scored."""
    (folder / "in").mkdir()
    place = folder / "in/mine.yaml"
    kind = number % 5
    if kind == 4:
        recipe = {"method": "mae", "batch_size": 1, "epochs": 1, "local_size": [16, 16, 16], "low": -1000, "lr": 1e-3}
        place.write_bytes(changed_yaml(rng, recipe))
        words = pretrain_words("mae", "--datalist", bench.data / "imagesTr")
        return ["build_pretraining", "--config", str(place), *words[2:]]
    if kind == 3:
        names = ["name", "description", "where", "licence", "citation", "layout", "modality"]
        source = {name: "x" for name in names} | {"folders": ["imagesTr"], "count": 3}
        listed = {
            "name": "x",
            "description": "x",
            "datasets": rng.choice([[str(place)], ["BTCV", "x"], ["in/mine.yaml"] * 2]),
        }
        place.write_bytes(changed_yaml(rng, rng.choice([source, source, listed])))
        if rng.random() < 0.3:
            place.write_text(yaml.safe_dump(listed))
        return ["cache", "--datasets", str(place), "--data_root", str(bench.data), "--cache_dir", "cache"]
    place.write_bytes(changed_yaml(rng, json.loads(json.dumps(PRESET)) | {"labels": dict(PRESET["labels"])}))
    data = bench.copy_data(folder)
    if kind == 0:
        words = ["--predictions", bench.folder / "predicted/out", "--labels", data / "labelsTr", "--preset", place]
        return ["evaluate", *map(str, words), "--out", "out"]
    if kind == 1:
        return ["cache", "--preset", str(place), "--data_root", str(data), "--cache_dir", "cache"]
    words = finetune_words(place, data)
    drop = words.index("--roi")
    return ["finetune", *words[:drop], *words[drop + 2 :]]
