"""The command line: flags of every kind, a file below them, groups, --help, exit codes."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml

from common.cli import parse, recipe_of, run_program
from common.config import group, setting, to_dict
from common.errors import InputError
from tests.helpers import ROOT


@dataclasses.dataclass
class Settings:
    """A program."""

    size: tuple[int, int, int] = setting((96, 96, 96), "voxels", least=1)
    mode: Literal["a", "b"] = setting("a", "which")
    rate: float | None = setting(None, "speed", above=0)
    fast: bool = setting(True, "quick")
    data: Path = setting(Path("data"), "folder")
    ids: tuple[int, ...] = setting((), "numbers")
    scale: tuple[float, float, float] | None = setting(None, "ratio")
    low: float = setting(0.0, "HU")


@dataclasses.dataclass
class First:
    ratio: float = setting(0.75, "share of first", above=0, below=1)


@dataclasses.dataclass
class Second:
    parts: int = setting(4, "parts of second", least=1)


@dataclasses.dataclass
class Both:
    heads: int = setting(8, "heads of both", least=1)


@dataclasses.dataclass(kw_only=True)
class Program:
    out_dir: Path = setting(help="folder of the run")
    method: Literal["first", "second", "third"] = setting("first", "how")
    first: First = group(First, "The first", method="first")
    second: Second = group(Second, "The second", method="second")
    both: Both = group(Both, "Both of them", method=("first", "second"))


def shown_by(cls, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(cls, argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, values",
    [
        ("", {}),
        ("--size 48", {"size": (48, 48, 48)}),
        ("--size 1 2 3", {"size": (1, 2, 3)}),
        ("--mode b --fast", {"mode": "b", "fast": True}),
        ("--no-fast", {"fast": False}),
        ("--fast false", {"fast": False}),
        ("--rate 1e-3", {"rate": 1e-3}),
        ("--rate none", {"rate": None}),
        ("--scale 1 2 3", {"scale": (1.0, 2.0, 3.0)}),
        ("--scale none", {"scale": None}),
        ("--data x/y --ids 3 4", {"data": Path("x/y"), "ids": (3, 4)}),
        ("--ids", {"ids": ()}),
        ("--low -1e3", {"low": -1000.0}),
        ("--low=-5 --data=a=b", {"low": -5.0, "data": Path("a=b")}),
    ],
)
def test_flags_of_every_kind(argv, values):
    assert parse(Settings, argv.split()) == dataclasses.replace(Settings(), **values)


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "s.yaml").write_text("size: 32\nmode: b\n")
    settings = parse(Settings, ["--mode", "a", "--config", str(tmp_path / "s.yaml")])
    assert settings.size == (32, 32, 32) and settings.mode == "a"


def test_later_flags_win_so_a_recipe_can_be_overridden():
    assert parse(Settings, ["--size", "1", "2", "3", "--size", "48"]).size == (48, 48, 48)
    assert parse(Settings, ["--no-fast", "--fast"]).fast and not parse(Settings, ["--fast", "--no-fast"]).fast


def test_a_file_given_to_a_recipe_wins_over_the_recipes_flags(tmp_path):
    (tmp_path / "s.yaml").write_text("low: 3\nrate: 4")
    words = f"--rate 2 --ids 9 --recipe a.sh --config {tmp_path / 's.yaml'} --low 5".split()
    found = parse(Settings, words)
    assert (found.rate, found.ids, found.low) == (4.0, (9,), 5.0)
    assert recipe_of(Settings, words) == ("a.sh", {"rate": 2.0, "ids": (9,)})


@pytest.mark.parametrize("recipe", ["--recipe a.sh", "--recipe=a.sh"])
def test_the_flags_of_a_recipe_are_those_before_its_name(tmp_path, recipe):
    (tmp_path / "s.yaml").write_text("size: 32\nlow: 1\n")
    argv = f"--config {tmp_path / 's.yaml'} --rate 2 --low 3 {recipe} --rate 4 --mode b".split()
    assert recipe_of(Settings, argv) == ("a.sh", {"size": (32, 32, 32), "low": 3.0, "rate": 2.0})
    settings = parse(Settings, argv)
    assert (settings.rate, settings.mode, settings.low) == (4.0, "b", 3.0)
    assert recipe_of(Settings, ["--rate", "2"]) is None
    # as when a program is called from pytest or a notebook
    assert recipe_of(Settings, ["-n", "0", "tests"]) is None


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--sice 3", ["--sice", "did you mean", "--size"]),
        ("--no-fats", ["--no-fats", "--no-fast"]),
        ("--qqqqqqqq", ["--qqqqqqqq", "--help"]),
        ("--mode c", ["--mode", "'c'", "a, b"]),
        ("--size 1 2", ["--size", "2 values 1 2", "3"]),
        ("--size 0", ["--size 0: ", "at least 1"]),
        ("--size 4 0 4", ["--size 4 0 4: ", "at least 1"]),
        ("--rate fast", ["--rate", "found 'fast'", "expected"]),
        ("--rate 1 2", ["--rate", "found 2 values 1 2", "expected"]),
        ("--rate", ["--rate", "found nothing", "expected"]),
        ("--fast 3", ["--fast", "found '3'", "expected"]),
        ("--config", ["--config", "found nothing"]),
        ("--recipe --rate 1", ["--recipe", "found nothing", "one name"]),
        ("--recipe a.sh b", ["--recipe", "found a.sh b", "one name"]),
        ("word --rate 1", ["'word'"]),
    ],
)
def test_wrong_flags_are_named(argv, words):
    with pytest.raises(InputError) as error:
        parse(Settings, argv.split())
    text = str(error.value)
    assert "\n" not in text and [w for w in words if w not in text] == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("size: 0", "size 0: "),
        ("rate: fast", "rate: found 'fast'"),
        ("sice: 3", "'sice'; did you mean 'size'"),
        ("- 1", "found list"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=f"recipe.yaml: .*{words}"):
        parse(Settings, ["--config", str(tmp_path / "recipe.yaml")])


def test_a_missing_setting_is_named_as_a_flag(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: second")
    with pytest.raises(InputError, match="--out_dir"):
        parse(Program, ["--config", str(tmp_path / "recipe.yaml")])


def test_a_setting_cannot_have_the_name_of_a_flag_of_ours():
    @dataclasses.dataclass
    class Taken:
        config: str = "x"

    with pytest.raises(TypeError, match="config"):
        parse(Taken, [])


# ---------------------------------------------------------------- groups


def test_flags_of_groups_have_flat_names():
    settings = parse(Program, "--out_dir x --method second --parts 2 --heads 3".split())
    assert (settings.second.parts, settings.both.heads, settings.first) == (2, 3, First())


@pytest.mark.parametrize("argv", ["--parts 2", "--method third --heads 2"])
def test_a_flag_of_an_unused_group_is_refused(argv):
    with pytest.raises(InputError) as error:
        parse(Program, ["--out_dir", "x", *argv.split()])
    method, flag = ("third", "--heads") if "third" in argv else ("first", "--parts")
    assert str(error.value).startswith(flag) and f"--method {method}" in str(error.value)
    assert "second" in str(error.value) and "\n" not in str(error.value)


def test_the_file_of_another_run_is_accepted_whole(tmp_path):
    run = Program(out_dir=Path("x"), first=First(0.5), second=Second(2))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(to_dict(run)))
    argv = ["--config", str(tmp_path / "settings.yaml")]
    assert parse(Program, argv) == run
    assert parse(Program, [*argv, "--method", "second"]) == dataclasses.replace(run, method="second")


def test_the_file_can_choose_the_group_of_a_flag(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: second\nout_dir: x")
    assert parse(Program, ["--config", str(tmp_path / "recipe.yaml"), "--parts", "2"]).second.parts == 2


# ---------------------------------------------------------------- help


def test_help_shows_every_setting_with_the_value_in_force(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("low: -175")
    text = shown_by(Settings, ["--config", str(tmp_path / "recipe.yaml"), "--size", "48", "--help"], capsys)
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert list(lines) == [f"--{field.name}" for field in dataclasses.fields(Settings)]
    assert all(word in lines["--size"] for word in ("voxels", "48 48 48", "96 96 96", "at least 1"))
    assert "-175" in lines["--low"] and "true" in lines["--fast"] and "none" in lines["--rate"]
    assert "a, b" in lines["--mode"]


def test_help_shows_the_groups_of_the_chosen_method(capsys):
    text = shown_by(Program, ["-h"], capsys)
    assert "--ratio" in text and "--heads" in text and "--parts" not in text and "required" in text
    heading = text.index("The first (--method first)")
    assert text.index("--method ") < heading < text.index("--ratio") < text.index("Both of them")
    text = shown_by(Program, ["--method", "second", "--help"], capsys)
    assert "--ratio" not in text and "--parts" in text and "--heads" in text


def test_help_all_shows_every_group(capsys):
    text = shown_by(Program, ["--help", "all"], capsys)
    assert all(f"--{name}" in text for name in ("ratio", "parts", "heads"))


# ---------------------------------------------------------------- exit codes


def test_a_bad_input_is_one_line_and_exit_code_2(capsys):
    def main():
        raise InputError("file x: found 3, expected 2")

    assert run_program(main) == 2
    assert capsys.readouterr().err == "error: file x: found 3, expected 2\n"
    assert run_program(lambda: None) == 0


def test_an_interrupt_is_exit_code_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert run_program(main) == 130 and capsys.readouterr().err.count("\n") == 1


def test_the_command_line_is_read_without_importing_torch():
    code = "import sys, common.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "error, words",
    [
        (InputError("a\nb: found"), "error: a b: found"),
        (OSError(36, "File name too long", "x" * 300), "xxx: File name too long"),
        (MemoryError(), "error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "error: not enough memory"),
    ],
)
def test_an_error_of_the_system_is_one_line(capsys, error, words):
    def main():
        raise error

    assert run_program(main) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("no file")])
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_program(main)
