"""The pages of documentation: links lead somewhere, and commands have flags that their programs accept."""

import argparse
import fnmatch
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from common import cli
from common.config import settings_of
from common.errors import InputError
from scripts.console import COMMANDS
from tests.documents import INDEX, INLINE, Command, all_commands, anchors, commands, links, pages, prose
from tests.helpers import ROOT

# programs beside those with a console command
OTHERS = ("scripts.check_leakage", "scripts.convert_cc_ccii", "scripts.list_fold", "scripts.make_sample_data")
# flags of other programs, in sentences
FOREIGN = {"--pdb", "--shm-size", "--ipc", "--kill-on-bad-exit", "--signal", "--signals-to-handle", "--nnodes"}
# the benchmarks have no common program; `NAME` stands for one of them
PLACEHOLDERS = ("benchmarks.NAME",)
# a line with which a recipe passes its arguments on to a program
PASSES_ON = re.compile(r'^(?:launch|finetune) (?:.*\\\n)*.*"\$@"$', re.M)


class Read(Exception):  # noqa: N818
    """A program has read its command line; `flags` are those that it accepts."""

    def __init__(self, flags):
        self.flags = set(flags)


def read_words(monkeypatch, module, words, complete=True):
    """Let a program read its command line, and return the flags that it accepts. No more of the program runs.

    Raises:
        InputError: as the program; with `complete` false not for settings that are missing.
    """

    def parse(cls, argv=None, description=None):
        known = settings_of(cls)
        try:
            cli.parse(cls, sys.argv[1:] if argv is None else argv, description)
        except InputError as error:
            if complete or not str(error).startswith("missing setting(s)"):
                raise
        negations = [f"--no-{name}" for name, entry in known.items() if entry.kind is bool]
        raise Read([f"--{name}" for name in (*cli.RESERVED, *known)] + negations)

    def parse_args(parser, argv=None):
        own_parse_args(parser, argv)
        raise Read(parser._option_string_actions)

    own_parse_args = argparse.ArgumentParser.parse_args
    program = importlib.import_module(reader_of(module))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [module, *words])
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        if hasattr(program, "parse"):
            patched.setattr(program, "parse", parse)
        try:
            program.main()
        except Read as read:
            return read.flags
    raise AssertionError(f"{module} has not read its command line")


def reader_of(module):
    """Return the module whose `main` reads the command line of `python -m MODULE`."""
    if module == "common.doctor":
        return "common.machine"
    return f"{module}.__main__" if ROOT.joinpath(*module.split(".")).is_dir() else module


def launched(script, words):
    """Return the module and the flags that a recipe gives to its launcher."""
    environment = os.environ | {"PYTHON": sys.executable, "LAUNCHER": r"printf %s\0"}
    # with it, recipes of fine-tuning only train
    stop = [] if "Pretrain" in script.read_text() else ["--dry_run"]
    command = ["bash", str(script), *words, *stop]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, module, *flags = done.stdout.split("\0")[:-1]
    return module, flags


def without_config(words):
    """Return the words without `--config FILE`, and whether they had it: the file is one of a run."""
    if "--config" not in words:
        return words, False
    place = words.index("--config")
    return words[:place] + words[place + 2 :], True


# ---------------------------------------------------------------- checking one command


def check(monkeypatch, command):
    """Raise AssertionError, InputError or SystemExit unless what a command names exists and accepts its flags."""
    for part in command.text.split("&&"):
        words = shlex.split(part)
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        {"python": check_python, "bash": check_bash, "torchrun": check_torchrun, "sbatch": check_sbatch}.get(
            words[0], check_other
        )(monkeypatch, words, command)


def check_python(monkeypatch, words, command):
    if words[1] == "-c":
        compile(words[2], "documented", "exec")
    elif words[1] == "-m":
        check_module(monkeypatch, words[2], words[3:], command)
    elif f"# {words[1]}\n" in (ROOT / command.page).read_text():
        # made from a block of the page; tests/test_extending.py runs it
        pass
    else:
        assert (ROOT / words[1]).is_file(), f"{command}: no such script"
        check_module(monkeypatch, words[1].removesuffix(".py"), words[2:], command)


def check_module(monkeypatch, module, words, command):
    if module in PLACEHOLDERS:
        return
    if command.inline and not words:
        # a program that is named in a sentence
        importlib.import_module(module)
        return
    words, from_file = without_config(words)
    # in a sentence, other settings may be left out
    complete = not command.inline and not from_file
    try:
        read_words(monkeypatch, module, words, complete)
    except SystemExit as end:
        assert end.code == 0 and "--help" in words, f"{command}: exit code {end.code}"


def check_bash(monkeypatch, words, command):
    script, words = ROOT / words[1], words[2:]
    assert script.is_file(), f"{command}: no such script"
    if PASSES_ON.search(script.read_text()):
        check_module(monkeypatch, *launched(script, words), command)
    else:
        known = set(re.findall(r"(--\w+)(?: \| --\w+)*\)", script.read_text()))
        assert {word for word in words if word.startswith("--")} <= known, f"{command}: {script.name} has {known}"


def check_torchrun(monkeypatch, words, command):
    given = get_args_parser().parse_args(words[1:])
    assert given.module, command
    check_module(monkeypatch, given.training_script, given.training_script_args, command)


def check_sbatch(monkeypatch, words, command):
    # options of sbatch come before the template
    template, *arguments = [word for word in words[1:] if not word.startswith("--array=")]
    assert (ROOT / template).is_file(), f"{command}: no such template"
    if arguments:
        recipe = re.search(r"RECIPE:-([^}]+)\}", (ROOT / template).read_text())[1]
        check_bash(monkeypatch, ["bash", recipe, *arguments], command)


def check_other(monkeypatch, words, command):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{command}: no such target"
    if words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), f"{command}: no such tests"


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for link in links(path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def test_every_page_is_in_the_index():
    listed = [path.name for path in pages() if path.parent == INDEX.parent]
    assert sorted(listed) == sorted(path.name for path in INDEX.parent.glob("*.md"))
    assert "docs/README.md" in links((ROOT / "README.md").read_text())


def test_links_are_found():
    text = '[a](b.md#c) ![d](e.png "f") `[g](h.md)` <img src="i.svg"> [j](https://k) [l]\n\n[l]: m.md\n'
    assert links(f"{text}```\n[n](o.md)\n```\n") == ["b.md#c", "e.png", "i.svg", "m.md"]


def test_anchors_are_those_of_github():
    text = "# A b, *c*\n## `d_e` - [f](g.md)\n## Twice\n### Twice\n```bash\n# no heading\n```\n"
    assert anchors(text) == {"a-b-c", "d_e---f", "twice", "twice-1"}


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", dict.fromkeys(all_commands()), ids=str)
def test_the_program_of_a_command_accepts_its_flags(monkeypatch, command):
    check(monkeypatch, command)


def test_flags_in_sentences_exist(monkeypatch):
    known = set(FOREIGN)
    for module in {*COMMANDS.values(), *OTHERS, "benchmarks.__main__"}:
        known |= read_words(monkeypatch, module, ["run"] if "report" in module else [], complete=False)
    for script in (ROOT / "scripts").rglob("*.sh"):
        known |= set(re.findall(r"^\s*(--\w+)\)", script.read_text(), re.M))
    found = {
        (path.name, flag)
        for path in pages()
        for span in INLINE.findall(prose(path.read_text()))
        if "…" not in span
        for flag in re.findall(r"(?<!\S)--[\w*-]+", span)
    }
    assert len(found) > 100
    assert {(page, flag) for page, flag in found if not fnmatch.filter(known, flag)} == set()


@pytest.mark.parametrize(
    "text",
    [
        "python -m Finetune.predikt --checkpoint a --images b --out c",
        "python -m Finetune.predict --checkpoint a --images b --ou c",
        "python -m Finetune.predict --checkpoint a --images b",
        "python -m Finetune.export a.pth --to b --format onnx",
        "python -m common.report runs/mine --wach",
        "python generate_cache_files.py --datalist a --worker 8",
        "bash scripts/pretrain_glmae.sh --num_mid 4",
        "bash scripts/pretrain_mim.sh --epochs many",
        "bash ./scripts/pretrain_gl.sh",
        "bash scripts/demo.sh --smok",
        "DATA=a OUT=b bash scripts/BTCV/run.sh --int a.pth",
        "bash scripts/test.sh && python -m Finetune.predict --checkpoint a --image b --out c",
        "torchrun --nproc=8 -m Pretrain.main_pretrain --config a.yaml --epoch 3",
        "torchrun --standalone --nproc_per_gpu=8 -m Pretrain.main_pretrain --config a.yaml",
        "sbatch scripts/slurm/pretrain.sbatch --epoch 800",
        "make lin",
    ],
)
def test_a_command_with_an_error_is_found(monkeypatch, text):
    with pytest.raises((AssertionError, InputError, SystemExit, ModuleNotFoundError)):
        check(monkeypatch, Command("README.md", text))


def test_commands_are_found():
    text = """`python a.py` and `A=b bash
c.sh --d`, `python`
```bash
# comment
e --f \\
  --g   # comment
```
```python
h
```

    python -m i
    python j.py

    no command
"""
    found = commands("page", text)
    assert [command.text for command in found] == [
        "python a.py",
        "A=b bash c.sh --d",
        "e --f --g",
        "python -m i",
        "python j.py",
    ]
    assert [command.inline for command in found] == [True, True, False, False, False]


def test_the_reading_order_starts_with_the_readme():
    assert [path.relative_to(ROOT) for path in pages()[:3]] == [
        Path("README.md"),
        Path("docs/README.md"),
        Path("docs/data.md"),
    ]
