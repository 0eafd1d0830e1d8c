"""Settings from plain values and back: types, bounds, groups, and errors that name what is wrong."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest

from common.config import convert, from_dict, group, load_yaml, read_yaml, setting, settings_of, to_dict
from common.errors import InputError


@dataclasses.dataclass
class Inner:
    low: float
    high: float = 1.0


@dataclasses.dataclass
class Preset:
    name: str
    window: Inner
    labels: dict[int, str] = setting({})


@dataclasses.dataclass
class Bounded:
    share: float = setting(0.5, least=0, most=1)
    ratio: float = setting(0.5, above=0, below=1)
    sizes: tuple[int, int] = setting((1, 1), above=0)
    rate: float | None = setting(None, above=0)
    any: float = 0.0


@dataclasses.dataclass
class Base:
    epochs: int = setting(100, "passes", least=1)


@dataclasses.dataclass
class ViT:
    patch: tuple[int, int, int] = setting((16, 16, 16), "voxels", least=1)


@dataclasses.dataclass
class First:
    ratio: float = setting(0.75, "share", above=0, below=1)


@dataclasses.dataclass
class Second:
    parts: int = setting(4, "number", least=1)
    vit: ViT = group(ViT, "ViT")


@dataclasses.dataclass
class Loop:
    out_dir: Path = setting(help="folder")


@dataclasses.dataclass(kw_only=True)
class Program(Base):
    method: Literal["first", "second"] = "first"
    first: First = group(First, "First", method="first")
    second: Second = group(Second, "Second", method="second")
    loop: Loop = group(Loop, "Loop")


def said(error: pytest.ExceptionInfo, *words: str) -> bool:
    """Does the message, of one line, have these words in this order?"""
    text, start = str(error.value), 0
    for word in words:
        start = text.index(word, start) + len(word)
    return "\n" not in text


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        (48, tuple[int, int, int], (48, 48, 48)),
        ([1, "2", 3], tuple[int, int, int], (1, 2, 3)),
        ([], tuple[int, ...], ()),
        ("1e-3", float, 1e-3),
        (2.0, int, 2),
        ("none", float | None, None),
        (None, tuple[int, int] | None, None),
        ([4, 5], tuple[int, int] | None, (4, 5)),
        (3, int | str, 3),
        ("x", int | str, "x"),
        ("true", bool, True),
        (False, Literal["auto", "off"], "off"),
        ("2", Literal[1, 2], 2),
        ("a/b", Path, Path("a/b")),
        (7, str, "7"),
        (1, list[float], [1.0]),
        ({"0": "air"}, dict[int, str], {0: "air"}),
        ({"x": [1]}, Any, {"x": [1]}),
    ],
)
def test_values_are_converted_to_their_type(value, kind, expected):
    converted = convert(value, kind, "x")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    "value, kind, words",
    [
        ("fast", float, ["'fast'", "number"]),
        ("fast", float | None, ["'fast'", "number"]),
        (True, int, ["True", "whole number"]),
        (1.5, int, ["1.5", "whole number"]),
        (math.inf, int, ["inf", "whole number"]),
        (None, str, ["None", "text"]),
        ([1, 2], float, ["2 values 1 2", "number"]),
        ([], Path, ["nothing", "path"]),
        ("yes", bool, ["'yes'", "true or false"]),
        ("c", Literal["a", "b"], ["'c'", "a, b"]),
        (None, Literal["none"], ["None", "none"]),
        ([1, 2], tuple[int, int, int], ["2 values 1 2", "3"]),
        ("x", dict[int, str], ["'x'", "mapping"]),
        ({1: 2}, dict[int, bool], ["2", "true or false"]),
    ],
)
def test_values_of_a_wrong_type_are_named(value, kind, words):
    with pytest.raises(InputError) as error:
        convert(value, kind, "the.yaml: size")
    assert said(error, "the.yaml: size", "found", words[0], "expected", *words[1:])


def test_a_type_without_conversion_is_a_programming_error():
    with pytest.raises(TypeError, match="set"):
        convert(1, set[int], "x")


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: x\nwindow: {low: 1, hihg: 2}", ["window", "hihg", "did you mean", "high"]),
        ("name: x\nwindow: {low: 1}\nzzzz: 2", ["zzzz", "name, window, labels"]),
        ("window: {low: 1}", ["missing", "name"]),
        ("name: x\nwindow: {low: true}", ["window", "low", "found True", "expected"]),
        ("name: x\nwindow: 3", ["window", "found int", "expected"]),
        ("- 1", ["found list", "expected"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_a_wrong_file_names_itself_and_the_setting(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_yaml(tmp_path / "p.yaml", Preset)
    assert said(error, "p.yaml: ", *words)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml: "):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="bytes.yaml: "):
        load_yaml(tmp_path / "bytes.yaml")


def test_nested_settings_come_from_nested_yaml(tmp_path):
    (tmp_path / "p.yaml").write_text("name: x\nwindow: {low: -175}\nlabels: {0: air, 1: liver}\n")
    preset = read_yaml(tmp_path / "p.yaml", Preset)
    assert preset == Preset("x", Inner(-175.0), {0: "air", 1: "liver"})
    assert from_dict(to_dict(preset), Preset) == preset


def test_an_empty_file_gives_the_defaults(tmp_path):
    (tmp_path / "p.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "p.yaml", Bounded) == Bounded()


@pytest.mark.parametrize(
    "name, value, bound",
    [
        ("share", -0.1, "at least 0"),
        ("share", 1.1, "at most 1"),
        ("ratio", 0, "more than 0"),
        ("ratio", 1, "less than 1"),
        ("sizes", [4, 0], "more than 0"),
        ("sizes", 0, "more than 0"),
        ("rate", 0, "more than 0"),
        ("rate", "nan", "finite"),
        ("any", "inf", "finite"),
        ("any", math.nan, "finite"),
    ],
)
def test_numbers_out_of_bounds_are_named(name, value, bound):
    with pytest.raises(InputError) as error:
        from_dict({name: value}, Bounded, "recipe.yaml")
    given = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    assert said(error, "recipe.yaml: ", f"{name} {given}: ", bound)


def test_bounds_themselves_are_kept():
    settings = from_dict({"share": 0, "sizes": 1, "rate": None}, Bounded)
    assert (settings.share, settings.sizes, settings.rate) == (0.0, (1, 1), None)
    assert from_dict({"share": 1}, Bounded).share == 1.0


def test_settings_become_plain_types():
    plain = to_dict(Program(loop=Loop(Path("a/b"))))
    assert plain["out_dir"] == "a/b" and plain["patch"] == [16, 16, 16]


def test_a_mutable_default_is_not_shared():
    first = Preset("x", Inner(0.0))
    first.labels[1] = "liver"
    assert Preset("y", Inner(0.0)).labels == {}


# ---------------------------------------------------------------- groups


def test_groups_keep_flat_names():
    flat = {"out_dir": "runs/x", "epochs": 3, "method": "second", "ratio": 0.5, "parts": 2, "patch": 8}
    settings = from_dict(flat, Program)
    assert settings == Program(
        epochs=3,
        method="second",
        first=First(0.5),
        second=Second(2, ViT((8, 8, 8))),
        loop=Loop(Path("runs/x")),
    )
    assert to_dict(settings) == flat | {"patch": [8, 8, 8]}
    assert from_dict(to_dict(settings), Program) == settings


def test_settings_of_groups_are_named_like_the_others():
    with pytest.raises(InputError, match="partz.*parts"):
        from_dict({"out_dir": "x", "partz": 2}, Program)
    with pytest.raises(InputError, match="out_dir"):
        from_dict({}, Program)
    with pytest.raises(InputError, match="r.yaml: patch 8 0 8: "):
        from_dict({"out_dir": "x", "patch": [8, 0, 8]}, Program, "r.yaml")
    with pytest.raises(InputError, match="unknown setting 'second'"):
        from_dict({"out_dir": "x", "second": {"parts": 2}}, Program)


def test_a_group_within_a_group_has_the_condition_of_both():
    assert settings_of(Program)["patch"].when == {"method": ("second",)}
    assert settings_of(Program)["patch"].title == "ViT" and not settings_of(Program)["epochs"].when


def test_two_settings_of_one_name_are_a_programming_error():
    @dataclasses.dataclass
    class Twice:
        patch: int = 1
        vit: ViT = group(ViT, "ViT")

    with pytest.raises(TypeError, match="patch"):
        settings_of(Twice)


@pytest.mark.parametrize("when", [{"method": "third"}, {"model": "first"}])
def test_a_condition_that_cannot_hold_is_a_programming_error(when):
    @dataclasses.dataclass
    class Never:
        method: Literal["first", "second"] = "first"
        vit: ViT = group(ViT, "ViT", **when)

    with pytest.raises(TypeError, match="patch"):
        settings_of(Never)


def test_a_required_setting_cannot_lie_in_an_unused_group():
    @dataclasses.dataclass
    class Needed:
        method: Literal["first", "second"] = "first"
        loop: Loop = group(Loop, "Loop", method="second")

    with pytest.raises(TypeError, match="out_dir"):
        settings_of(Needed)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: &x {b: *x}", BOMB, "a: " + "[" * 5000 + "]" * 5000, "a: 2020-99-99", "a: " + "9" * 5000]
)
def test_yaml_that_grows_without_end_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match="a.yaml") as raised:
        load_yaml(tmp_path / "a.yaml")
    assert len(str(raised.value)) < 600
