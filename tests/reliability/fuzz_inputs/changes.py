"""Random changes that several kinds of input have in common: of bytes, values, entries and files."""

import os
import random
from pathlib import Path
from typing import Any

import torch


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return bytes that are cut, flipped, repeated, replaced or followed by others."""
    place, extra = rng.randrange(len(content) or 1), rng.randbytes(rng.choice([1, 16, 4096]))
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 8, 64])):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    choices = [content[:place], bytes(flipped), bytes(flipped), content + extra, content[place:], b"", content * 2]
    choices += [content[:place] + extra + content[place + len(extra) :], extra, content[:place] + content[place + 1 :]]
    return rng.choice(choices)


def numbers(rng: random.Random) -> Any:
    """Return a number, or something else, that is unusual where a number is expected."""
    return rng.choice(
        [0, -1, 1, 2, 3, 255, 256, -32768, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-30, 1e300]
        + [float("nan"), float("inf"), float("-inf"), None, True, "", "abc", "1", [], [1], {}, {"a": 1}, "é\u0301 "]
    )


def change_value(rng: random.Random, value: Any) -> Any:
    """Return another value in place of a tensor or plain value."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and rng.random() < 0.8:
        broken = value.clone()
        if broken.numel():
            broken.view(-1)[0] = rng.choice([float("nan"), float("inf"), 1e38])
        wide = torch.zeros(1).expand(*(4096 for _ in range(max(2, value.ndim))))
        others = [
            value.to_sparse(),
            value.half(),
            value.int(),
            value.double(),
            value.flatten()[:1].clone(),
            value.flatten(),
        ]
        others += [
            value.flatten()[:1].clone(),
            torch.zeros(0),
            value[None],
            torch.zeros(()),
            torch.quantize_per_tensor(value.float(), 1.0, 0, torch.qint8),
        ]
        return rng.choice(
            [broken, broken, wide, value.to_sparse(), *others, value.to(torch.complex64), value.to("meta")]
        )
    return rng.choice([numbers(rng), {}, [], "x" * 100, torch.zeros(2), {"a": {"b": []}}, 10**9])


def change_entry(rng: random.Random, content: Any) -> Any:
    """Change, remove or add one entry somewhere in nested dicts and lists, in place."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return content
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and rng.random() < 0.85:
            place = place[key]
            continue
        kind = rng.random()
        if kind < 0.25:
            del place[key]
        elif kind < 0.35 and isinstance(place, dict):
            place[rng.choice(["x", "", 1, "blocks.x.y", "blocks.99.w", "module.module.a", None])] = place[key]
        else:
            place[key] = change_value(rng, place[key])
        return content


def special_file(rng: random.Random, place: Path) -> None:
    """Put something that is not a file, or not a readable one, in place of a file."""
    place.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(place)
    elif kind == 1:
        place.symlink_to(place)
    elif kind == 2:
        place.mkdir()
    else:
        place.symlink_to(place.parent / "nothing.nii.gz")


def plain(value: Any) -> Any:
    """Return a value that YAML can hold: tensors become lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value
