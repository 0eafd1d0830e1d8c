"""The report on the machine: what follows from its numbers, its exit code, and that it leaves nothing behind."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from common import doctor, machine
from tests.helpers import ROOT, run_module

GOOD = {
    "versions": dict.fromkeys(machine.SHOWN, "1.0"),
    "gpus": [{"name": "GPU", "memory": 80 << 30, "capability": [9, 0]}],
    "driver": "550.1",
    "cuda": "12.8",
    "cores": 16.0,
    "memory": 128 << 30,
    "shared": 64 << 30,
    "shared_rates": {"write": 3e9, "read": 4e9},
    "open_files": 20000,
    "rates": {"matmul cpu": 1e12, "memory copy": 1e10, "decode": 1e9, "matmul cuda:0": 5e14, "copy cuda:0": 2.5e10},
    "disks": {
        name: {"folder": f"/data/{name}", "free": 1 << 40, "writable": True, "write": 1e9, "read": 2e9}
        for name in ("cache", "runs")
    },
}


def changed(**values):
    return copy.deepcopy(GOOD) | values


def disk(**values):
    report = copy.deepcopy(GOOD)
    report["disks"]["cache"] |= values
    return report


def test_memory_for_the_largest_volume_is_no_finding():
    assert list(machine.findings(changed(memory=16 * 10**9))) == []


def test_a_good_machine_has_no_findings():
    assert list(machine.findings(GOOD)) == []
    text = machine.screen(GOOD, [])
    assert len(text.splitlines()) < 24 and max(map(len, text.splitlines())) <= 140
    assert "64.0 GiB; write 3 GB/s; read 4 GB/s" in text
    for part in (
        "GPU, 80.0 GiB; matrix product 500 TFLOP/s, copies to it 25 GB/s",
        "16; matrix product 1 TFLOP/s",
        "1.1 TB free",
        "nothing",
    ):
        assert part in text


@pytest.mark.parametrize(
    "report, level, text, remedy",
    [
        (changed(gpus=[], driver=None), "slow", "no GPU", "--dry_run"),
        (changed(gpus=[]), "slow", "driver 550.1, but torch 1.0 finds no GPU", "pytorch.org"),
        (changed(gpus=[{"name": "V100", "memory": 1, "capability": [7, 0]}]), "slow", "no bfloat16", "--amp fp16"),
        (changed(memory=2 << 30), "may fail", "2.15 GB of memory; each process", "--workers"),
        # what the text says is needed is what is asked for
        (changed(memory=int(15.9e9)), "may fail", "15.9 GB of memory; each process", "--workers"),
        (changed(cores=2.0), "slow", "2 cores", "--workers 1"),
        (changed(cores=0.5), "slow", "0.5 cores", "--workers 0"),
        (changed(shared=64 << 20), "may fail", "67.1 MB in /dev/shm", "--shm-size"),
        (changed(open_files=256), "may fail", "256 open files", "ulimit -n"),
        (disk(writable=False), "fails", "/data/cache: cannot be written", "--cache_dir on another disk"),
        (disk(free=5 << 30), "may fail", "5.37 GB free", "make room"),
        (disk(free=1 << 20, write=None, read=None), "fails", "1.05 MB free", "make room"),
        (disk(read=2e7), "slow", "/data/cache: 20 MB/s", "--loader_only"),
    ],
)
def test_each_problem_has_a_remedy(report, level, text, remedy):
    (finding,) = machine.findings(report)
    assert finding.level == level and text in finding.text and remedy in finding.remedy
    assert finding.remedy in machine.screen(report, [finding])


def test_this_machine_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine, "DISK_BYTES", 1 << 20)
    report = machine.measure({"cache": tmp_path / "a/b", "runs": tmp_path})
    assert all(rate > 0 for rate in report["rates"].values())
    assert all(disk["writable"] and disk["write"] > 0 and disk["read"] > 0 for disk in report["disks"].values())
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["disks"]["cache"]["folder"] == str(tmp_path / "a/b") and list(tmp_path.iterdir()) == []
    if report["shared"] is not None:
        assert report["shared_rates"]["write"] > 0 and report["shared_rates"]["read"] > 0
    json.dumps(report)
    machine.screen(report, list(machine.findings(report)))


@pytest.mark.parametrize("broken", [False, True])
def test_the_exit_code_says_whether_something_fails(monkeypatch, capsys, broken):
    monkeypatch.setattr(machine, "measure", lambda folders: disk(writable=False) if broken else GOOD)
    if broken:
        with pytest.raises(SystemExit) as stopped:
            machine.main(["--json"])
        assert stopped.value.code == 1
    else:
        machine.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert [finding["level"] for finding in report["findings"]] == ["fails"] * broken


def test_packages_are_checked_before_they_are_imported(monkeypatch, capsys):
    found = {"torch": None, "monai": "0.9"}
    monkeypatch.setattr(doctor, "installed", lambda name: found.get(name, "1000"))
    with pytest.raises(SystemExit, match="1"):
        doctor.main()
    error = capsys.readouterr().err
    assert "torch: not installed, expected >=2.8" in error and doctor.INSTALL in error
    found["torch"] = "2.9"
    problems = doctor.package_problems()
    assert "monai: found 0.9, expected >=1.6.1,<2" in problems and not any(
        line.startswith("torch:") for line in problems
    )
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert any("3.11 or newer" in line for line in doctor.package_problems())


def test_only_the_standard_library_is_imported_first():
    code = "import sys; import common.doctor; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "yaml", "monai"} & set(done.stdout.split())


@pytest.mark.slow
def test_the_program_reports_on_this_machine(tmp_path):
    done = run_module("common.doctor", "--json", "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "runs")
    assert json.loads(done.stdout)["versions"]["torch"] and list(tmp_path.iterdir()) == []
