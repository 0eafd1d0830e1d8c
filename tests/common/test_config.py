"""Settings: flags, YAML, and messages that name what is wrong."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from common.cli import parse, run_program
from common.config import read_yaml, setting, to_dict
from common.errors import InputError


@dataclasses.dataclass
class Inner:
    low: float
    high: float = 1.0


@dataclasses.dataclass
class Settings:
    """A program."""

    size: tuple[int, int, int] = setting((96, 96, 96), "voxels")
    mode: Literal["a", "b"] = setting("a", "which")
    rate: float | None = setting(None, "rate")
    fast: bool = setting(True, "quick")
    data: Path = setting(Path("data"), "folder")
    ids: tuple[int, ...] = setting((), "numbers")
    scale: tuple[float, float, float] | None = setting(None, "scale")


@dataclasses.dataclass
class Preset:
    name: str
    window: Inner
    labels: dict[int, str] = setting({})


def test_flags_of_every_kind():
    settings = parse(
        Settings, ["--size", "48", "--mode", "b", "--rate", "1e-3", "--no-fast", "--data", "x/y", "--ids", "3", "4"]
    )
    assert settings == Settings((48, 48, 48), "b", 1e-3, False, Path("x/y"), (3, 4))
    assert parse(Settings, ["--size", "1", "2", "3", "--rate", "none"]).size == (1, 2, 3)
    assert parse(Settings, ["--scale", "1", "2", "3"]).scale == (1.0, 2.0, 3.0)
    assert parse(Settings, ["--scale", "none"]).scale is None
    assert parse(Settings, []) == Settings()


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "s.yaml").write_text("size: 32\nmode: b\n")
    settings = parse(Settings, ["--config", str(tmp_path / "s.yaml"), "--mode", "a"])
    assert settings.size == (32, 32, 32) and settings.mode == "a"


def test_later_flags_win_so_a_recipe_can_be_overridden():
    assert parse(Settings, ["--size", "96", "--size", "48"]).size == (48, 48, 48)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sice", "3"], "--size"),
        (["--mode", "c"], "mode: found 'c', allowed: a, b"),
        (["--size", "1", "2"], "size: found 2 values"),
        (["--rate", "fast"], "rate: found 'fast', needs float"),
        (["--size", "1.5"], "size: found '1.5', needs int"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        parse(Settings, argv)


def test_wrong_keys_name_the_nearest_right_one(tmp_path):
    (tmp_path / "p.yaml").write_text("name: x\nwindow: {low: 1, hihg: 2}\n")
    with pytest.raises(InputError, match="p.yaml.*hihg.*did you mean 'high'"):
        read_yaml(tmp_path / "p.yaml", Preset)
    (tmp_path / "p.yaml").write_text("window: {low: 1}\n")
    with pytest.raises(InputError, match="missing setting.*name"):
        read_yaml(tmp_path / "p.yaml", Preset)
    (tmp_path / "p.yaml").write_text("name: x\nwindow: {low: true}\n")
    with pytest.raises(InputError, match="low: found True, needs float"):
        read_yaml(tmp_path / "p.yaml", Preset)
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        read_yaml(tmp_path / "p.yaml", Preset)
    with pytest.raises(InputError, match="none.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml", Preset)


def test_yaml_makes_nested_settings(tmp_path):
    (tmp_path / "p.yaml").write_text("name: x\nwindow: {low: -175}\nlabels: {0: air, 1: liver}\n")
    assert read_yaml(tmp_path / "p.yaml", Preset) == Preset("x", Inner(-175.0), {0: "air", 1: "liver"})


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--share", "-0.1"], "share: found -0.1, needs at least 0"),
        (["--sizes", "4", "0"], r"sizes: found \(4, 0\), needs more than 0"),
        (["--rate", "nan"], "rate: found nan, needs more than 0"),
    ],
)
def test_numbers_out_of_bounds_are_named(argv, message):
    @dataclasses.dataclass
    class Bounded:
        share: float = setting(0.5, least=0)
        sizes: tuple[int, int] = setting((1, 1), above=0)
        rate: float | None = setting(None, above=0)

    assert parse(Bounded, ["--share", "0"]).share == 0.0 and parse(Bounded, []).rate is None
    with pytest.raises(InputError, match=message):
        parse(Bounded, argv)


def test_help_shows_every_setting_with_the_value_in_force(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["--size", "48", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name}" in shown for f in dataclasses.fields(Settings))
    assert "48" in shown and "[default true]" in shown and "[default none]" in shown


def test_settings_become_plain_types():
    plain = to_dict(Settings(data=Path("a/b")))
    assert plain["data"] == "a/b" and plain["size"] == [96, 96, 96]


def test_a_bad_input_is_one_line_and_exit_code_2(capsys):
    def main():
        raise InputError("file x: found 3, allowed 2")

    assert run_program(main) == 2
    assert capsys.readouterr().err == "error: file x: found 3, allowed 2\n"
    assert run_program(lambda: None) == 0
