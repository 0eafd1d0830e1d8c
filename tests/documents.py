"""The pages of documentation in reading order, their headings, and the commands that they show."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

INDEX = ROOT / "docs/README.md"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
INLINE = re.compile(r"`([^`]+)`")
COMMENT = re.compile(r"(?:^|\s+)#.*$")
# as at the start of a line, after variables that are set for it
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|bash|torchrun|sbatch|pytest|pip|make|git|source|docker run|ulimit) ")


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line and without its comment. `inline`: in a sentence or a table."""

    page: str
    text: str
    inline: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def pages() -> list[Path]:
    """Return the documents: README.md, docs/ in the order of its index, and the other files of the root."""
    listed = [INDEX.parent / name for name in re.findall(r"^\* \[[^]]+\]\(([\w-]+\.md)\)", INDEX.read_text(), re.M)]
    first = [ROOT / "README.md", INDEX, *listed]
    return [*first, *sorted(set(ROOT.glob("*.md")) - set(first))]


def prose(text: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page.

    Lower case, without punctuation except `-` and `_`, spaces as `-`; repeated ones are numbered from 1.
    """
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.M):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        while name in found:
            found[name] += 1
            name = f"{name}-{found[name]}"
        found[name] = 0
    return set(found)


def links(text: str) -> list[str]:
    """Return the targets of the links and images of a page that are no web addresses."""
    plain = INLINE.sub("", prose(text))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", plain) + re.findall(r"""(?:src|href)=["']([^"']+)""", plain)
    targets += re.findall(r"^\[[^]]+\]:\s*(\S+)", plain, re.M)
    return [target for target in targets if not re.match(r"\w+:", target)]


def commands(page: str, text: str) -> list[Command]:
    """Return the commands of a page in its order: of ```bash blocks, indented blocks and inline code."""
    bash = [(m.start(), m[2]) for m in FENCED.finditer(text) if m[1] in ("bash", "sh", "console")]
    # fenced blocks as blank lines, so that places stay comparable
    rest = FENCED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    indented = [(m.start(), m[0]) for m in INDENTED.finditer(rest) if PROGRAM.match(m[0].lstrip())]
    rest = INDENTED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), rest)
    inline = [(m.start(), " ".join(m[1].split())) for m in INLINE.finditer(rest)]
    found = [(place, Command(page, line)) for place, block in bash + indented for line in lines_of(block)]
    found += [(place, Command(page, span, inline=True)) for place, span in inline if PROGRAM.match(span)]
    return [command for _, command in sorted(found, key=lambda item: item[0])]


def lines_of(block: str) -> list[str]:
    """Return the commands of a block without comments, continued lines joined."""
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    lines = [COMMENT.sub("", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def all_commands() -> list[Command]:
    """Return the commands of all pages in reading order."""
    return [found for path in pages() for found in commands(str(path.relative_to(ROOT)), path.read_text())]
