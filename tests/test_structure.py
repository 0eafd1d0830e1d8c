"""The rules of this repository's structure: which part may import which, file names, and references between files.

common/ has three subpackages with rules of their own (`SUBPACKAGES`): data, cache and training.
"""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.training.method import Method

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "Finetune", "Pretrain", "benchmarks", "scripts", "tests")
SUBPACKAGES = {"common.data", "common.cache", "common.training"}
COMMON = {"common", *SUBPACKAGES}
PROGRAMS = {"generate_cache_files", "scripts", "benchmarks"}
# area of the importing file -> areas that it may import
ALLOWED = {
    "common": {"common"},
    "common.data": {"common", "common.data"},
    "common.cache": {"common", "common.data", "common.cache"},
    "common.training": {"common", "common.data", "common.training"},
    "Finetune": {*COMMON, "Finetune"},
    "Pretrain": {*COMMON, "Pretrain", "Finetune"},
    **dict.fromkeys(PROGRAMS, {*COMMON, *PROGRAMS, "Finetune", "Pretrain"}),
}
ENCODERS = ("models_3dvit.py", "models_convvit3d.py")
# needed for exported folders only; an encoder file imports them in the function that needs them
OF_EXPORTS = {"huggingface_hub", "safetensors"}
HOOKS = tuple(name for name in vars(Method) if not name.startswith("_"))
# It lies in a package, so `import statistics` still finds the standard library.
STANDARD_NAMES_IN_USE = {"statistics.py"}


def code_files() -> list[Path]:
    """All Python files except tests."""
    folders = [ROOT / package for package in PACKAGES if package != "tests"]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def name_of(path: Path) -> str:
    """Return the dotted name of the module at `path`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def area(module: str) -> str:
    """Return the part of the repository that a module belongs to; another package's top-level name for the rest."""
    first_two = ".".join(module.split(".")[:2])
    return first_two if first_two in SUBPACKAGES else module.split(".")[0]


def references(source: str, path: Path) -> set[str]:
    """Return the modules that a file imports or names: everywhere in it, also in functions, `if TYPE_CHECKING` blocks
    and strings, as given to importlib.import_module or to a forkserver."""
    tree = ast.parse(source)
    found = {name for node in ast.walk(tree) for name in [*_imported(node, path), *_named(node)]}
    # With Finetune/ on the path its encoders import each other without a package.
    beside = {file.stem: name_of(file) for file in path.parent.glob("*.py")}
    return {beside.get(name, name) for name in found}


def _imported(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = path.relative_to(ROOT).parent.parts
        parts = [*package[: len(package) + 1 - node.level]] if node.level else []
        module = ".".join([*parts, *([node.module] if node.module else [])])
        is_package = ROOT.joinpath(*module.split(".")).is_dir()
        yield from (f"{module}.{alias.name}" if is_package else module for alias in node.names)


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+\.?", node.value):
            yield node.value
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        yield from (word.value for word in node.args if isinstance(word, ast.Constant) and word.value in PACKAGES)


def encoder_files() -> set[Path]:
    """Return the encoders of Finetune and the files beside them that they import."""
    found: set[Path] = set()
    waiting = {ROOT / "Finetune" / name for name in ENCODERS}
    while waiting:
        path = waiting.pop()
        found.add(path)
        names = of(references(path.read_text(), path), "Finetune")
        waiting |= {ROOT / "Finetune" / f"{name.split('.')[1]}.py" for name in names} - found
    return found


def of(modules: set[str], *packages: str) -> set[str]:
    return {module for module in modules if module.split(".")[0] in packages}


def short(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


# ---------------------------------------------------------------- who may import whom


@pytest.mark.parametrize("path", code_files(), ids=short)
def test_a_file_imports_only_what_its_area_may_import(path):
    used = of(references(path.read_text(), path), *PACKAGES, "generate_cache_files")
    assert {module for module in used if area(module) not in ALLOWED[area(name_of(path))]} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "Pretrain").rglob("*.py")), ids=short)
def test_pretrain_imports_only_the_encoders_of_finetune(path):
    allowed = {name_of(file) for file in encoder_files()}
    assert of(references(path.read_text(), path), "Finetune") <= allowed


@pytest.mark.parametrize("path", sorted(encoder_files()), ids=short)
def test_an_encoder_needs_torch_and_timm_only(path):
    allowed = {*sys.stdlib_module_names, "torch", "timm"}
    used = {module for module in references(path.read_text(), path) if module not in map(name_of, encoder_files())}
    assert {module.split(".")[0] for module in used} <= allowed | OF_EXPORTS
    at_start = {name for node in ast.parse(path.read_text()).body for name in _imported(node, path)}
    assert {module.split(".")[0] for module in at_start} & OF_EXPORTS == set()


@pytest.mark.parametrize(
    "source, found",
    [
        ("import common.cache.build", "common.cache.build"),
        ("from common import cache", "common.cache"),
        ("from common.cache import build as b", "common.cache.build"),
        ("from common.cache.build import build_cache", "common.cache.build"),
        ("from . import sampler", "common.data.sampler"),
        ("from ..cache import build", "common.cache.build"),
        ("from .. import errors", "common.errors"),
        ("def f():\n    import Pretrain.build", "Pretrain.build"),
        ("if TYPE_CHECKING:\n    from Finetune.data import Cases", "Finetune.data"),
        ("importlib.import_module('Pretrain.build')", "Pretrain.build"),
        ("__import__('Pretrain')", "Pretrain"),
        ("context.set_forkserver_preload(['common.cache.build'])", "common.cache.build"),
        ("import_module(f'Finetune.models_{name}')", "Finetune.models_"),
        ("import sampler", "common.data.sampler"),
    ],
)
def test_references_are_found(source, found):
    assert found in references(source, ROOT / "common/data/loader.py")


# ---------------------------------------------------------------- files


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")[:-1]
    if not names:
        pytest.skip("not a git checkout")
    return [name for name in names if (ROOT / name).is_file()]


def test_no_file_is_named_like_a_standard_module():
    names = {Path(name).name for name in tracked() if name.endswith(".py")} - STANDARD_NAMES_IN_USE
    assert {name for name in names if name.removesuffix(".py") in sys.stdlib_module_names} == set()


def test_no_file_is_large():
    assert [name for name in tracked() if (ROOT / name).stat().st_size > 500_000] == []


def unsafe_loads(source: str) -> list[str]:
    """Return the calls in a file that can run code which stands in the data that they read."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if _runs_code(ast.unparse(call.func), call.keywords)]


def _runs_code(function: str, keywords: list[ast.keyword]) -> bool:
    options = {word.arg: ast.unparse(word.value) for word in keywords}
    if function == "torch.load":
        return options.get("weights_only") != "True"
    if function in ("np.load", "numpy.load"):
        return options.get("allow_pickle", "False") != "False"
    return function in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load")


def test_data_is_loaded_without_running_code():
    python = [name for name in tracked() if name.endswith(".py")]
    assert {name: found for name in python if (found := unsafe_loads((ROOT / name).read_text()))} == {}


@pytest.mark.parametrize(
    "source, count",
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, map_location='cpu', weights_only=True)", 0),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path)", 0),
        ("pickle.loads(content)", 1),
        ("yaml.load(text, Loader=yaml.Loader)", 1),
        ("yaml.safe_load(text)", 0),
        ("model.eval(), eval(text)", 1),
    ],
)
def test_unsafe_loads_are_found(source, count):
    assert len(unsafe_loads(source)) == count


def test_paths_in_texts_exist():
    """`common/files.py` in a docstring, comment or document names a file that is there."""
    ending = r"[\w/.-]*\.(?:py|md|sh|sbatch|yaml|png|ipynb)\b"
    pattern = re.compile(rf"(?<![\w/.$-])((?:{'|'.join(PACKAGES)}|docs|assets)/{ending})")
    texts = [name for name in tracked() if name.endswith((".py", ".md", ".sh", ".sbatch", ".yaml", ".toml"))]
    named = {(name, path) for name in texts for path in pattern.findall((ROOT / name).read_text())}
    assert len(named) > 50 and {(name, path) for name, path in named if not (ROOT / path).exists()} == set()


# ---------------------------------------------------------------- functions


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code: no blank lines, comments or docstrings."""
    other = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for token in tokens if token.type not in other for n in range(token.start[0], token.end[0] + 1)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def functions(path: Path) -> dict[str, int]:
    """Return the functions of a file with their number of code lines, signature included."""
    source = path.read_text()
    lines = code_lines(source)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {f"{short(path)}:{f.lineno} {f.name}": len(lines & set(range(f.lineno, f.end_lineno + 1))) for f in found}


def test_an_update_passes_through_eight_files():
    """docs/architecture.md lists them in order; `test_paths_in_texts_exist` checks that they exist."""
    listed = re.findall(r"^ (\d) (\S+/\S+)", (ROOT / "docs/architecture.md").read_text(), re.M)
    assert [int(number) for number, _ in listed] == list(range(1, 9))
    assert all((ROOT / path).is_file() for _, path in listed)


def test_functions_are_short():
    lengths = {name: length for path in code_files() for name, length in functions(path).items()}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert statistics.median(lengths.values()) <= 8


@pytest.mark.parametrize("path", [p for p in code_files() if area(name_of(p)) in {*COMMON, "Pretrain"}], ids=short)
def test_the_training_loop_calls_hooks_directly(path):
    """Every hook is a method of Method with a default, so no code asks whether it is there."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    asked = [ast.unparse(call) for call in calls if ast.unparse(call.func) in ("hasattr", "getattr")]
    assert [text for text in asked if text.startswith("hasattr(") or any(f"'{hook}'" in text for hook in HOOKS)] == []


def test_code_lines_are_counted():
    source = '"""Module."""\n\n\ndef f(\n    x,\n):\n    """Two\n    lines."""\n\n    # why\n    return """a\nb"""\n'
    assert code_lines(source) == {4, 5, 6, 11, 12}


def test_names_of_tests_are_short():
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    nodes = [(path, node) for path in tests for node in ast.walk(ast.parse(path.read_text()))]
    names = [(short(path), f.name) for path, f in nodes if isinstance(f, ast.FunctionDef) and f.name[:5] == "test_"]
    assert len(names) > 300 and [(path, name) for path, name in names if len(name) > 60] == []
