"""docs/troubleshooting.md: every message that it quotes is one that the programs print."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GAP = "…"


def template(node: ast.JoinedStr | ast.Constant) -> str:
    """Return a text of the code with a gap for everything that is filled in."""
    if isinstance(node, ast.Constant):
        return re.sub(r"\{[^{}]*\}", GAP, node.value)
    return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)


def texts(source: str) -> list[str]:
    """Return the texts of a file, also those that are filled into others."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.JoinedStr, ast.Constant))]
    return [template(n) for n in nodes if isinstance(n, ast.JoinedStr) or isinstance(n.value, str)]


def code_texts() -> list[str]:
    files = [*(ROOT / "common").rglob("*.py"), *(ROOT / "Finetune").rglob("*.py"), *(ROOT / "Pretrain").rglob("*.py")]
    return [text for path in files for text in texts(path.read_text())]


def is_printed(message: str, known: list[str]) -> bool:
    """Return whether one text of the code has the message, whatever fills its gaps."""
    return any(re.search(".*".join(map(re.escape, message.split(GAP))), text, re.DOTALL) for text in known)


QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)


@pytest.fixture(scope="module")
def known():
    return code_texts()


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_code(message, known):
    assert is_printed(message, known)


def test_other_messages_are_not_found(known):
    assert len(QUOTED) > 30
    for message in ("…: found no volumes of …; expected …", "…: there is no such checkpoint", "…: is a setting for …"):
        assert not is_printed(message, known)


def test_every_message_has_a_remedy():
    sections = re.split(r"^### .*$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)[1:]
    assert all(len(section.split("\n## ")[0].strip()) > 30 for section in sections)
