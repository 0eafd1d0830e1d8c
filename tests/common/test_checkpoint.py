"""Checkpoints are written completely or not at all, hold plain types, and are refused with the reason if damaged."""

import argparse
import os

import numpy as np
import pytest
import torch

from common import checkpoint
from common.errors import InputError


def test_content_is_read_back_without_pickled_code(tmp_path):
    content = {"model": {"a": torch.rand(3)}, "epoch": 4, "args": {"x": [1, 2.5, "s", None, True]}}
    checkpoint.save(tmp_path / "c.pth", content)
    loaded = torch.load(tmp_path / "c.pth", weights_only=True)
    assert torch.equal(loaded["model"]["a"], content["model"]["a"]) and loaded["args"] == content["args"]
    assert checkpoint.load(tmp_path / "c.pth")["epoch"] == 4
    assert os.listdir(tmp_path) == ["c.pth"]


@pytest.mark.parametrize("value", [np.float64(1), argparse.Namespace(), object(), {"deep": [np.int64(3)]}])
def test_other_types_are_refused_before_writing(tmp_path, value):
    with pytest.raises(TypeError, match="plain types"):
        checkpoint.save(tmp_path / "c.pth", {"args": value})
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file_only(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    checkpoint.save(path, {"epoch": 1})

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="c.pth.*No space left"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1 and os.listdir(tmp_path) == ["c.pth"]


@pytest.mark.parametrize("name, reason", [("torn", "readable"), ("list", "found list"), ("none", "no such")])
def test_unusable_files_are_named(tmp_path, name, reason):
    checkpoint.save(tmp_path / "c.pth", {"model": {"a": torch.rand(1000)}})
    (tmp_path / "torn.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:900])
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(InputError, match=rf"{name}.pth: .*{reason}"):
        checkpoint.load(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("place", [b"PK\x06\x07", b"PK\x01\x02"], ids=["locator", "directory"])
def test_damage_to_the_archives_directory_is_found(tmp_path, place):
    checkpoint.save(tmp_path / "c.pth", {"model": {"a": torch.rand(1000)}})
    data = bytearray((tmp_path / "c.pth").read_bytes())
    # In the locator this is the number of disks, which zipfile.is_zipfile already refuses.
    data[data.rindex(place) + 16] ^= 0x10
    (tmp_path / "c.pth").write_bytes(data)
    with pytest.raises(InputError, match="c.pth: damaged"):
        checkpoint.verify(tmp_path / "c.pth")


def test_an_empty_file_is_refused_in_words(tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(InputError, match="a.pth: found the end of the file"):
        checkpoint.load(tmp_path / "a.pth")
