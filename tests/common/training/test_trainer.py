"""What the trainer loads, and when."""

import time

import pytest

from common.data import loader
from common.errors import InputError
from tests.common.training.toy import Numbers, run_toy


class Stop(Exception):
    pass


def test_the_next_epoch_is_loaded_while_this_one_is_validated(tmp_path, monkeypatch):
    read = Numbers.__getitem__

    def traced(self, item):
        (tmp_path / f"read{item[0]}").touch()
        return read(self, item)

    monkeypatch.setattr(Numbers, "__getitem__", traced)

    def validate(epoch, log, method):
        # an epoch has 12 positions, of which the loading process could read 8 ahead
        end = time.monotonic() + 20
        while not (tmp_path / "read19").exists() and time.monotonic() < end:
            time.sleep(0.01)
        raise Stop

    with pytest.raises(Stop):
        run_toy(tmp_path / "run", workers=1, after_epoch=validate)
    assert (tmp_path / "read19").exists() and not (tmp_path / "read20").exists()


def test_a_run_with_loading_processes_checks_shared_memory_first(tmp_path, monkeypatch):
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: type("", (), {"free": 100}))
    with pytest.raises(InputError, match="MB free, about .* MB needed"):
        run_toy(tmp_path / "run", workers=1)
    assert not list((tmp_path / "run").glob("*.pth"))
    run_toy(tmp_path / "other", workers=0, epochs=1)
