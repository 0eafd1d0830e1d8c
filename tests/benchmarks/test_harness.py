"""Measuring functions, the program and its table, with benchmarks that cost nothing."""

import json
import time

import pytest
import torch
from torch import nn

from benchmarks import __main__ as program
from benchmarks import harness, machine, table
from common.cli import run_program

CPU = torch.device("cpu")
ROW = harness.Row(name="work", against="another", ours=2.0, theirs=3.0, aim=1.2)


@pytest.fixture
def fake(monkeypatch):
    """Two benchmarks that record with which arguments they were called."""
    calls = []

    def measure(quick, device):
        calls.append((quick, device.type))
        return [ROW.as_dict()]

    monkeypatch.setattr(program, "BENCHMARKS", {"first": ("one", measure), "second": ("two", measure)})
    monkeypatch.setattr(machine, "matrix_rate", lambda device, dtype: 1e9)
    return calls


def run(*flags):
    return run_program(lambda: program.main(list(map(str, flags))))


# ---------------------------------------------------------------- measuring


def test_peak_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return (b * 2).sum()

    # three tensors of 4 MB, two of them at once
    assert 8_000_000 <= harness.peak_memory(work, CPU) < 8_100_000


def test_flops_include_the_backward_pass_and_attention():
    x = torch.rand(1, 2, 30, 8, requires_grad=True)
    attention = harness.count_flops(lambda: nn.functional.scaled_dot_product_attention(x, x, x).sum().backward())
    # two products in the forward pass and two for each of them in the backward pass
    assert attention == 3 * 2 * (2 * 2 * 30 * 30 * 8)
    linear = nn.Linear(8, 4)
    assert harness.count_flops(lambda: linear(torch.rand(5, 8))) == 2 * 5 * 8 * 4


def test_functions_take_turns_and_medians_ignore_an_outlier():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.2 if order.count("slow") == 2 else 0.02)

    seconds = harness.alternate({"slow": slow, "fast": lambda: order.append("fast")}, 3)
    assert 0.015 < seconds["slow"] < 0.1 and seconds["fast"] < 0.01
    # one call of each that does not count, then each begins in turn
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]


def test_comparison_fills_every_column():
    def step(count):
        return lambda: sum((torch.rand(200, 200) @ torch.rand(200, 200) for _ in range(count)), torch.zeros(200, 200))

    row = harness.compare("products", step(1), step(40), against="more", device=CPU, aim=2.0)
    assert row["ratio"] == row["theirs"] / row["ours"] > 2
    assert row["peak_memory_ratio"] == row["peak_bytes"] / row["their_peak_bytes"] <= 1
    assert 0 < row["share_of_rate"] < 2


def test_threads_are_restored():
    before = torch.get_num_threads()
    with harness.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_program_that_fails_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match="no good"):
        harness.peak_resident(["python3", "-c", "raise SystemExit('no good')"])
    assert harness.peak_resident(["python3", "-c", "x = bytearray(50_000_000)"]) > 50_000_000


# ---------------------------------------------------------------- the program


def test_rows_are_printed_and_written(fake, tmp_path, capsys):
    assert run("--only", "second", "--quick", "--device", "cpu", "--json", tmp_path / "rows.json") == 0
    assert fake == [(True, "cpu")]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    for name in ("name", "ours", "theirs", "ratio", "unit", "peak_memory_ratio", "share_of_rate"):
        assert name in row
    assert row["benchmark"] == "second" and row["ratio"] == 1.5 and row["share_of_rate"] is None
    assert {"cpu", "cores", "threads", "gpu", "versions", "commit", "matrix_rate"} <= set(row["machine"])
    assert (tmp_path / "rows.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "1.50 (aim 1.2)" in printed and "matrix rate float32 1 GFLOP/s" in printed


def test_all_benchmarks_run_unless_some_are_named(fake):
    assert run("--device", "cpu") == 0
    assert fake == [(False, "cpu")] * 2


def test_an_unknown_name_is_one_clear_message(fake, capsys, tmp_path):
    assert run("--only", "frist", "--json", tmp_path / "rows.json") == 2
    error = capsys.readouterr().err
    assert error == "error: --only frist: no such benchmark; did you mean first?\n"
    assert not fake and not list(tmp_path.iterdir())


def test_the_list_names_every_benchmark(capsys):
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(program.BENCHMARKS)


def test_markdown_is_made_from_the_file(fake, tmp_path, capsys):
    run("--device", "cpu", "--json", tmp_path / "rows.json")
    capsys.readouterr()
    assert run("--markdown", tmp_path / "rows.json") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = "| work | another | 2 s | 3 s | 1.50 (aim 1.2) | - | - |  |"
    assert lines.count(cells) == 2 and lines[2].startswith("| work | compared with |")
    assert len(fake) == 2


def rows_of(*ratios):
    """Rows with these ratios, and 1.2 as the aim of the last one."""
    rows = [harness.Row(name=f"work {ratio}", against="a", ours=1.0, theirs=ratio).as_dict() for ratio in ratios]
    return [*rows[:-1], rows[-1] | {"aim": 1.2}]


def test_bars_are_logarithms_of_the_ratios():
    alone = harness.Row(name="alone", against="none", ours=1.0).as_dict()
    lines = table.bars([*rows_of(16.0, 4.0, 0.25, 1.0), alone])
    assert [line.rpartition(" ")[2] for line in lines] == ["+" * table.WIDTH, "+" * 20, "-" * 20, ""]
    assert lines[2].startswith("work 0.25") and "0.25 -" in lines[2]
    assert table.plain(rows_of(4.0)).endswith("4.00 " + "+" * table.WIDTH)


def test_the_picture_has_bars_from_one_and_marks_at_aims():
    axes = table.draw(rows_of(4.0, 0.25)).axes[0]
    # the first row is at the top
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = {name: (bar.get_x(), bar.get_x() + bar.get_width()) for name, bar in zip(names, axes.patches)}
    assert bars == {"work 4.0": (1.0, 4.0), "work 0.25": (1.0, 0.25)} and names[-1] == "work 4.0"
    assert axes.collections[0].get_offsets().tolist() == [[1.2, 0.0]] and axes.get_xscale() == "log"


@pytest.mark.parametrize("content", ["", "{}", '[{"name": 1}]', "[1]"])
def test_a_file_without_rows_is_named(tmp_path, capsys, content):
    (tmp_path / "rows.json").write_text(content)
    assert run("--markdown", tmp_path / "rows.json") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/rows.json: found no rows")
    assert run("--markdown", tmp_path / "none.json") == 2
    assert "none.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.0123, "s", "12.3 ms"),
        (2e-6, "s per set", "2 µs per set"),
        (4.2e6, "bytes", "4.2 MB"),
        (12.0, "bytes", "12 B"),
        (1.5, "voxels", "1.5 voxels"),
        (None, "s", "-"),
    ],
)
def test_quantities(value, unit, text):
    assert table.quantity(value, unit) == text


# ---------------------------------------------------------------- the cheap benchmarks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cache_formats", "sliding_window", "prediction", "growth"])
def test_cheap_benchmarks_run(name, tmp_path):
    """They check themselves that both sides compute the same."""
    assert run("--only", name, "--quick", "--device", "cpu", "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(row["ours"] > 0 and row["ratio"] > 0 for row in rows)
