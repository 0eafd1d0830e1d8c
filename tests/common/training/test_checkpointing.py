"""What is on disk survives: full disks, kills, altered bytes; and the writer's errors reach whoever trains."""

import os
import signal
import threading
import time

import pytest
import torch

from common import checkpoint
from common.errors import InputError
from common.files import lock_folder
from common.training import checkpointing, trainer
from common.training.checkpointing import CheckpointWriter, existing_checkpoints, load_first_intact
from tests.common.training.toy import CPU, Toy, run_toy, same_weights
from tests.helpers import read_log


def content(step):
    return {
        "model": {"w": torch.full((2000,), float(step))},
        "epoch": step,
        "args": {"step": step, "names": ["a", "b"]},
    }


def write(folder, *steps):
    saver = CheckpointWriter(folder, None)
    for step in steps:
        saver.save(content(step), keep=f"checkpoint-{step}.pth" if step % 2 else None)
    saver.wait()


def step_of(path):
    return checkpoint.load(path)["args"]["step"]


def test_last_previous_and_the_kept_ones(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    assert {p.name: step_of(p) for p in tmp_path.iterdir()} == {
        "checkpoint-1.pth": 1,
        "checkpoint-3.pth": 3,
        "checkpoint-previous.pth": 3,
        "checkpoint-last.pth": 4,
    }
    assert [p.name for p in existing_checkpoints(tmp_path)][:2] == ["checkpoint-last.pth", "checkpoint-previous.pth"]
    assert [p.name for p in existing_checkpoints(tmp_path)][2:] == ["checkpoint-3.pth", "checkpoint-1.pth"]


def test_the_writer_has_a_copy_of_its_own(tmp_path, monkeypatch):
    """Training goes on while the file is written: what is written is the state at the call."""
    go, real = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a: (go.wait(10), real(*a)))
    state, saver = content(1), CheckpointWriter(tmp_path, None)
    saver.save(state)
    state["model"]["w"].fill_(9.0)
    state["args"]["names"].append("c")
    assert not (tmp_path / checkpoint.LAST).exists()
    go.set()
    saver.wait()
    loaded = checkpoint.load(tmp_path / checkpoint.LAST)
    assert loaded["model"]["w"].unique().tolist() == [1.0] and loaded["args"]["names"] == ["a", "b"]


def test_a_write_error_is_raised_in_the_training_thread(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    saver = CheckpointWriter(tmp_path, None)
    saver.save(content(2))
    while not saver._writing.done():
        time.sleep(0.01)
    with pytest.raises(InputError, match="checkpoint-last.pth.*No space left"):
        saver.due()
    assert step_of(tmp_path / checkpoint.LAST) == 1 and not list(tmp_path.glob(".*"))


def test_a_run_on_a_full_disk_ends_and_can_be_resumed(tmp_path, monkeypatch):
    whole, _ = run_toy(tmp_path / "whole")
    real, calls = torch.save, []

    def full_later(content, file):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_later)
        with pytest.raises(InputError, match="checkpoint-last.pth.*cannot be written.*file write failed"):
            run_toy(tmp_path / "cut")
    assert step_of(tmp_path / "cut" / checkpoint.LAST) == 6
    resumed, _ = run_toy(tmp_path / "cut")
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("harm", ["truncated", "altered", "empty"])
def test_a_damaged_last_checkpoint_is_replaced_by_the_previous(tmp_path, harm, capsys):
    whole, _ = run_toy(tmp_path / "whole")
    run_toy(
        tmp_path / "cut", epochs=3, save_every=100
    )  # another schedule does not matter: learning_rate is a function of the step
    last = tmp_path / "cut" / checkpoint.LAST
    data = bytearray(last.read_bytes())
    if harm == "altered":
        at = data.index(checkpoint.load(last)["model"]["layers.0.weight"].numpy().tobytes())
        data[at + 5] ^= 1
    last.write_bytes({"truncated": data[: len(data) // 2], "altered": data, "empty": b""}[harm])
    os.unlink(last.with_name("checkpoint-2.pth"))  # the same file under its other name
    capsys.readouterr()
    resumed, _ = run_toy(tmp_path / "cut", save_every=100)
    said = capsys.readouterr().out
    assert "checkpoint-last.pth: " in said and "checkpoint-previous.pth: 6 updates done" in said
    assert same_weights(whole, resumed)


def test_a_damaged_checkpoint_never_replaces_a_good_one(tmp_path, monkeypatch):
    """Torn last, good previous; then the next writing fails as well, in its middle."""
    write(tmp_path, 2, 4)
    (tmp_path / checkpoint.LAST).write_bytes(b"torn")
    path, found = load_first_intact(existing_checkpoints(tmp_path), CPU)
    assert path.name == checkpoint.PREVIOUS and found["args"]["step"] == 2
    assert (tmp_path / "checkpoint-last.damaged").read_bytes() == b"torn"

    def full(content, file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        saver = CheckpointWriter(tmp_path, None)
        saver.save(content(6))
        with pytest.raises(InputError):
            saver.wait()
    assert load_first_intact(existing_checkpoints(tmp_path), CPU)[1]["args"]["step"] == 2


def test_nothing_to_go_on_from(tmp_path):
    assert load_first_intact(existing_checkpoints(tmp_path), CPU) is None


def test_a_run_with_only_damaged_checkpoints_does_not_start(tmp_path):
    run_toy(tmp_path, epochs=2)
    for path in existing_checkpoints(tmp_path):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="no readable checkpoint.*--resume none"):
        run_toy(tmp_path)


def test_any_altered_byte_is_refused_or_harmless(tmp_path):
    """Whichever byte changes: the file is refused, or what is read is what was written (padding, time stamps)."""
    checkpoint.save(tmp_path / "c.pth", content(5))
    data, refused = (tmp_path / "c.pth").read_bytes(), 0
    for at in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:400].tolist():
        (tmp_path / "d.pth").write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            loaded = checkpoint.load(tmp_path / "d.pth")
        except InputError as error:
            assert "d.pth" in str(error)
            refused += 1
        else:
            assert torch.equal(loaded["model"]["w"], content(5)["model"]["w"]) and loaded["args"] == content(5)["args"]
    assert refused > 300


def test_what_a_killed_writer_left_is_removed_at_the_start(tmp_path):
    for name in ("checkpoint-last.pth", "reconstruction-1.png", "log.jsonl"):
        (tmp_path / f".{name}.0a1b2c3d.tmp").write_bytes(b"half")
    run_toy(tmp_path, epochs=1)
    assert [p.name for p in tmp_path.glob(".*")] == [".lock"]


def test_no_permission(tmp_path):
    (tmp_path / "folder").write_text("a file in the way")
    saver = CheckpointWriter(tmp_path / "folder", None)
    saver.save(content(1))
    with pytest.raises(InputError, match="cannot be written"):
        saver.wait()


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    write(tmp_path, 1, 2, 3)
    assert [step_of(tmp_path / n) for n in ("checkpoint-1.pth", "checkpoint-previous.pth", "checkpoint-last.pth")] == [
        1,
        2,
        3,
    ]


def test_a_named_checkpoint_is_taken_or_refused(tmp_path):
    write(tmp_path, 1)
    path, loaded = load_first_intact([tmp_path / "checkpoint-1.pth"], CPU)
    assert path.name == "checkpoint-1.pth" and loaded["epoch"] == 1
    with pytest.raises(InputError, match="nowhere.pth: no such checkpoint"):
        load_first_intact([tmp_path / "nowhere.pth"], CPU)


def test_copies_share_nothing():
    state = {"a": torch.zeros(3), "b": [torch.zeros(2), {"c": (torch.zeros(1), "x")}]}
    copy = checkpointing.host_copy(state)
    state["a"].fill_(1), state["b"][0].fill_(1), state["b"][1]["c"][0].fill_(1)
    assert (
        not copy["a"].any()
        and not copy["b"][0].any()
        and not copy["b"][1]["c"][0].any()
        and copy["b"][1]["c"][1] == "x"
    )


@pytest.mark.parametrize("name", ["log.jsonl", "settings.yaml", "requeue"])
def test_any_file_that_cannot_be_written_is_named(tmp_path, name):
    """A folder is in its way, as a full disk would be."""

    class Asked(Toy):
        def after_step(self, step):
            (tmp_path / name).mkdir(exist_ok=True)
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    if name == "settings.yaml":
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name}: cannot be written"):
        run_toy(tmp_path, Asked())


def test_one_process_trains_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOCK_TIMEOUT", 0.5)
    run_toy(tmp_path, epochs=1)
    with lock_folder(tmp_path) as lock:
        assert lock is not None
        with pytest.raises(InputError, match="another process is already training in this folder"):
            run_toy(tmp_path)
    assert read_log(tmp_path)[-1]["epoch"] == 0
    run_toy(tmp_path)
    assert read_log(tmp_path)[-1]["epoch"] == 3
