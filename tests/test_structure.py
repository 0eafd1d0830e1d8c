"""Who may know whom (the README's map of the house), read from the imports."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENCODERS = {"Finetune.models_3dvit", "Finetune.models_convvit3d"}


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports; `from Finetune import models_3dvit` counts as Finetune.models_3dvit."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parent.parts) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            names |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def of(names: set[str], *packages: str) -> set[str]:
    return {n for n in names if n.split(".")[0] in packages}


@pytest.mark.parametrize("path", files("common"), ids=lambda p: p.name)
def test_common_knows_neither_program(path):
    assert not of(imports(path), "Pretrain", "Finetune", "tests", "benchmarks")


@pytest.mark.parametrize("path", files("Finetune"), ids=lambda p: p.name)
def test_finetune_does_not_know_pretrain(path):
    assert not of(imports(path), "Pretrain", "tests", "benchmarks")


@pytest.mark.parametrize("path", files("Pretrain"), ids=lambda p: p.name)
def test_pretrain_knows_of_finetune_the_encoders_alone(path):
    assert of(imports(path), "Finetune") <= ENCODERS
    assert not of(imports(path), "tests", "benchmarks")


def test_the_vit_stands_alone():
    allowed = {"torch", "timm", "argparse", "math", "os", "re", "collections", "dataclasses", "functools", "zipfile"}
    assert {n.split(".")[0] for n in imports(ROOT / "Finetune/models_3dvit.py")} <= allowed


def test_the_hybrid_encoder_needs_only_its_neighbour():
    own = of(imports(ROOT / "Finetune/models_convvit3d.py"), "common", "Pretrain", "Finetune", "models_3dvit")
    assert own <= {"Finetune.models_3dvit", "models_3dvit"}


def test_nothing_large_or_machine_bound_is_tracked():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[
        :-1
    ]
    if not tracked:
        pytest.skip("not a git checkout")
    large = [f for f in tracked if (ROOT / f).is_file() and (ROOT / f).stat().st_size > 500_000]
    assert large == []
    unsafe = [
        f
        for f in tracked
        if f.endswith(".py") and not f.startswith("tests/") and "weights_only=False" in (ROOT / f).read_text()
    ]
    assert unsafe == []
