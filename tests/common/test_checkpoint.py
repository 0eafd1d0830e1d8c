"""Checkpoints: whole or not at all, plain, and refused in words."""

import argparse
import os

import numpy as np
import pytest
import torch

from common import checkpoint
from common.errors import InputError


def test_what_is_written_is_read_back_without_pickled_code(tmp_path):
    content = {"model": {"a": torch.rand(3)}, "epoch": 4, "args": {"x": [1, 2.5, "s", None, True]}}
    checkpoint.save(tmp_path / "c.pth", content)
    loaded = torch.load(tmp_path / "c.pth", weights_only=True)
    assert torch.equal(loaded["model"]["a"], content["model"]["a"]) and loaded["args"] == content["args"]
    assert checkpoint.load(tmp_path / "c.pth")["epoch"] == 4
    assert os.listdir(tmp_path) == ["c.pth"]


@pytest.mark.parametrize("value", [np.float64(1), argparse.Namespace(), object(), {"deep": [np.int64(3)]}])
def test_other_types_are_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="plain types"):
        checkpoint.save(tmp_path / "c.pth", {"args": value})
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    checkpoint.save(path, {"epoch": 1})

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="c.pth.*No space left"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1 and os.listdir(tmp_path) == ["c.pth"]


def test_bad_files_are_named(tmp_path):
    checkpoint.save(tmp_path / "c.pth", {"model": {"a": torch.rand(1000)}})
    (tmp_path / "torn.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:900])
    torch.save([1], tmp_path / "list.pth")
    for name, message in [
        ("torn", "not a readable checkpoint"),
        ("list", "needs a dict"),
        ("none", "no such checkpoint"),
    ]:
        with pytest.raises(InputError, match=rf"{name}.pth: .*{message}"):
            checkpoint.load(tmp_path / f"{name}.pth")
