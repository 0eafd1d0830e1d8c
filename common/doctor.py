"""Report what this machine offers, what will be slow or will fail on it, and the remedy.

    python -m common.doctor
    python -m common.doctor --cache_dir /scratch/cache --out_dir /results --json

The exit code is 0 unless something will surely fail. Until it is known that the packages are there, only the standard
library is imported; common/machine.py does the rest.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
PYTHON = (3, 11)
INSTALL = "python -m pip install -r requirements.txt -c constraints.txt"


def required() -> dict[str, str]:
    """Return the packages of requirements.txt and their permitted versions, name -> specifier."""
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return {re.match(r"[\w.-]+", line)[0]: re.sub(r"^[\w.-]+\s*", "", line) for line in lines if line}


def installed(name: str) -> str | None:
    """Return the version of an installed package, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_problems() -> list[str]:
    """Return what is wrong with Python and the packages of requirements.txt, one line for each."""
    problems = []
    if sys.version_info < PYTHON:
        problems.append(f"Python: found {sys.version.split()[0]}, expected {'.'.join(map(str, PYTHON))} or newer")
    found = {name: installed(name) for name in required()}
    problems += [f"{name}: not installed, expected {required()[name]}" for name, number in found.items() if not number]
    if problems:
        return problems
    # torch, MONAI and timm need it, so it is there when they are
    from packaging.specifiers import SpecifierSet

    fits = {name: SpecifierSet(allowed).contains(found[name], prereleases=True) for name, allowed in required().items()}
    return [f"{name}: found {found[name]}, expected {required()[name]}" for name, fit in fits.items() if not fit]


def main() -> NoReturn:
    """Check the packages, then the machine. SystemExit with code 1 when something will surely fail, else 0."""
    if problems := package_problems():
        print("\n".join(f"fails: {problem}" for problem in problems) + f"\n  remedy: {INSTALL}", file=sys.stderr)
        raise SystemExit(1)
    from common import machine
    from common.cli import run_program

    raise SystemExit(run_program(machine.main))


if __name__ == "__main__":
    main()
