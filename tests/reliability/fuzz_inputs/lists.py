"""Changed data lists, in JSON and as text."""

import json
import random
from pathlib import Path
from typing import Any

from tests.reliability.fuzz_inputs.bench import Bench, Words
from tests.reliability.fuzz_inputs.changes import change_entry, damaged, numbers, plain

PATHS = ["imagesTr/c0.nii.gz", "", ".", "/", "..", "a\0b", "\ud800", "x" * 300, "y/" * 3000, " ", "~", "nothing.nii.gz"]
PATHS += [
    "imagesTr",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "a\nb",
    "dataset.json",
    "imagesTr/../imagesTr/c0.nii.gz",
]


# lists met in use: a NUL character in a path, and nesting, by number of the input
MET = {0: b'{"training": [{"image": "a\\u0000b.nii.gz"}]}', 1: b"[" * 3000 + b"]" * 3000}


def changed_list(rng: random.Random, content: Any) -> bytes:
    """Return a JSON list with paths, types or nesting that do not belong there."""
    kind = rng.randrange(9)
    text = json.dumps(content)
    if kind == 0:
        depth = rng.choice([100, 900, 3000, 200_000])
        nested = rng.choice([("[", "]"), ('{"training":', "}")])
        return (nested[0] * depth + "1" + nested[1] * depth).encode()
    if kind == 1:
        return damaged(rng, text.encode())
    if kind == 2:
        return rng.choice([text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode() + b"\xff", b"NaN"])
    if kind == 3:
        return text.replace('"test"', '"training"').replace("c1", rng.choice(["c0", "c2"])).encode()
    if kind in (4, 5):
        case = rng.choice(content["training"])
        case[rng.choice(["image", "label"])] = rng.choice([*PATHS, *PATHS, numbers(rng)])
    elif kind == 6:
        names = ["fold", "name", "fold", "name", "image", "label"]
        for case in content["training"]:
            case[rng.choice(names)] = rng.choice([numbers(rng), "9" * 5000, "a/b", ".x", "c0", rng.randrange(3)])
    elif kind == 7:
        return text.replace(
            '"training": [', f'"training": [{rng.choice(["9" * 5000, "1e999", "-Infinity", "[]"])}, '
        ).encode()
    else:
        change_entry(rng, content)
    return json.dumps(plain(content)).encode()


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A JSON or text list: paths (NUL, surrogates, devices), types, nesting, encodings, names, folds."""
    data = bench.copy_data(folder)
    if number % 4 == 3:
        place = data / "list.txt"
        lines = [*(rng.choice(PATHS) for _ in range(rng.randrange(4))), "imagesTr/c1.nii.gz", "# a comment"]
        rng.shuffle(lines)
        place.write_bytes("\n".join(lines).encode(errors="surrogatepass") + rng.choice([b"", b"\xff", b"\r\n", b"\0"]))
    else:
        place = data / "dataset.json"
        place.write_bytes(MET.get(number) or changed_list(rng, json.loads(place.read_text())))
    source = str(place)
    if number not in MET and rng.random() >= 0.9:
        # an argument cannot hold these two characters
        source = str(data / rng.choice(PATHS).replace("\0", "?").replace("\ud800", "?"))
    preset, labels = str(bench.folder / "preset.yaml"), ["--labels"] if rng.random() < 0.5 else []
    model = str(bench.folder / "finetuned/out")
    return rng.choice(
        [
            ["cache", "--datalist", source, "--cache_dir", "cache", *labels],
            ["cache", "--datalist", source, "--cache_dir", "cache", "--dry_run", "--allow_failures"],
            ["cache", "--preset", preset, "--datalist", source, "--cache_dir", "cache"],
            ["predict", "--checkpoint", model, "--images", source, "--out", "out", "--no-overlays"],
            ["sweep", "--preset", preset, "--data", source, "--out", "out", "--updates", "40", "--slurm"],
            ["evaluate", "--preset", preset, "--predictions", str(bench.folder / "predicted/out"), "--labels", source]
            + ["--out", "out"],
            ["leakage", "--pretrain", source, "--finetune", preset, "--data", str(data), "--cache_dir", "cache"]
            + ["--exclude_leaks", "out/clean.txt"],
        ]
    )
