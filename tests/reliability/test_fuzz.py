"""The fuzzer (fuzz.py): every 24th of its inputs in the fast tests, all of them in the slow ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.config import convert_setting, settings_of
from common.errors import InputError
from tests.helpers import ROOT
from tests.reliability import fuzz
from tests.reliability.fuzz_inputs.settings import CLASSES

# every n-th input of each kind in the fast tests
STEP = 24
SOME_INPUTS = f"""
import sys
from pathlib import Path
from tests.reliability import fuzz

results = fuzz.run_all(Path(sys.argv[1]), fuzz.every_input({STEP}))
if faults := [str(result) for result in results if result.fault]:
    sys.exit("\\n".join(faults))
print(*sorted({{result.outcome for result in results}}), len(results))
"""


def test_changed_inputs_are_read_or_refused_with_a_reason(tmp_path):
    # in a process of its own: autograd refuses to run in a fork of one that has used it, as other tests do
    done = subprocess.run([sys.executable, "-c", SOME_INPUTS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    *outcomes, count = done.stdout.split()
    assert outcomes == ["accepted", "refused"] and int(count) > 40


@pytest.mark.slow
def test_a_thousand_inputs_have_no_fault():
    command = [sys.executable, "-m", "tests.reliability.fuzz", "--table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert len(fuzz.every_input()) >= 1000


@pytest.mark.parametrize(
    "action, code, fault",
    [
        (lambda: 1 / 0, 1, "Traceback in the output"),
        (lambda: Path("ran").write_text("x"), 0, "code in the pickle"),
        (lambda: [Path("out").mkdir(), Path("out/a.json").write_text("{")], 0, "half written"),
        (lambda: [Path("in").mkdir(), Path("in/a").write_text("x")], 0, "input was changed"),
        (lambda: sys.exit(3), 3, "exit code 3"),
    ],
)
def test_a_fault_is_noticed(tmp_path, monkeypatch, action, code, fault):
    monkeypatch.setitem(fuzz.PROGRAMS, "fault", lambda argv: action())
    monkeypatch.setitem(fuzz.KINDS, "fault", (lambda *_: ["fault"], 1))
    result = fuzz.try_input("fault", 0, tmp_path / "x", fuzz.Bench(tmp_path))
    assert result.code == code and fault in result.fault


def test_lack_of_memory_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.PROGRAMS, "full", lambda argv: [b"x" * 2**31])
    monkeypatch.setitem(fuzz.KINDS, "full", (lambda *_: ["full"], 1))
    result = fuzz.try_input("full", 0, tmp_path / "x", fuzz.Bench(tmp_path))
    assert (result.code, result.fault) == (2, "") and "not enough memory" in result.output


def test_an_input_depends_on_kind_and_number_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.PROGRAMS, "print", print)
    for kind in "ab":
        monkeypatch.setitem(fuzz.KINDS, kind, (lambda rng, *_: ["print", str(rng.random())], 1))

    def words(kind, number, folder):
        return fuzz.try_input(kind, number, tmp_path / folder, fuzz.Bench(tmp_path)).words

    first, again = words("a", 5, "1"), words("a", 5, "2")
    assert first == again and first not in (words("a", 6, "3"), words("b", 5, "4"))


SIZES = (
    "depth embed_dim embed_dims depths num_heads patch_size local_size global_size roi decoder_embed_dim decoder_depth "
    "decoder_num_heads feature_size out_dim hidden_dim bottleneck_dim local_views global_views crops batch_size "
    "micro_batch_size workers channels epochs samples_per_epoch seed hang_minutes"
).split()


@pytest.mark.parametrize("program", ["pretrain", "finetune", "cache"])
def test_sizes_that_no_machine_can_hold_are_refused(program):
    known = settings_of(CLASSES[program])
    tested = [name for name in SIZES if name in known]
    for name in tested:
        with pytest.raises(InputError, match=f"--{name} 9+.*at most"):
            convert_setting("9" * 25, known[name], f"--{name}")
    assert tested
