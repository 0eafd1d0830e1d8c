"""A fuzzer: 1,000 valid inputs that are changed at random, each given to the program that reads it.

    python -m tests.reliability.fuzz --table            about 3 minutes on one core
    python -m tests.reliability.fuzz --only DICOM --number 17

Each input is a function of its kind and number. It is run in a forked process with a limit on time and memory, and must
end with exit code 0, or with 2 and one line that gives the reason. A fault is: a traceback, an exception's name in
the output, a signal, another exit code, an input that was changed, a file that is half written or temporary, code in a
pickle that ran, or a limit that was exceeded.
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from common import checkpoint
from common.cli import run_program
from common.config import load_yaml
from tests.reliability.fuzz_inputs import KINDS
from tests.reliability.fuzz_inputs.bench import PROGRAMS, RAN, Bench, Words

SECONDS = 30
# that an input may need on top of the imported libraries
MEMORY = 1 << 30
EXCEPTION = re.compile(r"Traceback|\b[A-Z]\w*(Error|Exception)\b")
NOT_MADE = 99


@dataclasses.dataclass(frozen=True)
class Result:
    """What a program did with an input. `fault` is "" for an input that was accepted, or refused with a reason."""

    kind: str
    number: int
    code: int
    output: str
    seconds: float
    fault: str
    words: Words

    @property
    def outcome(self) -> str:
        return "faults" if self.fault else "refused" if self.code else "accepted"

    def __str__(self) -> str:
        text = f"--only '{self.kind}' --number {self.number}: {self.fault or self.outcome}\n  {' '.join(self.words)}"
        return f"{text}\n{self.output[-3000:]}".encode(errors="backslashreplace").decode()


# ---------------------------------------------------------------- one input


def fork(folder: Path, action: Callable[[], int], seconds: int = SECONDS, memory: int = MEMORY) -> tuple[int, int]:
    """Run `action` in a forked process with `folder` as working directory and its output in output.txt.

    Returns:
        Its exit code (-n after signal n), and its peak memory in bytes on top of that of this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    before = memory_of_process("VmRSS")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, errors="backslashreplace")
            # A fork loses the thread pool. Create it here, before two threads try to.
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (memory_of_process("VmSize") + memory,) * 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            # a process that waits uses no time of the processor, and other processes may share it
            signal.alarm(5 * seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            code = action()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), max(0, usage.ru_maxrss * 1024 - before)


def memory_of_process(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024


def run_words(words: Words) -> int:
    """Run a program as its command line does, and return its exit code."""
    program, *argv = words
    return run_program(lambda: PROGRAMS[program](argv))


def try_input(kind: str, number: int, folder: Path, bench: Bench, seed: int = 0) -> Result:
    """Make an input in `folder`, run its program, and check what it did."""
    began, folder = time.monotonic(), folder.resolve()
    rng = random.Random(f"{seed} {kind} {number}")

    def action() -> int:
        try:
            words = KINDS[kind][0](rng, folder, bench, number)
        except BaseException:
            traceback.print_exc()
            return NOT_MADE
        (folder / "words.json").write_text(json.dumps([words, fingerprint(folder / "in")]))
        return run_words(words)

    code, memory = fork(folder, action)
    output = (folder / "output.txt").read_text(errors="replace")
    record = folder / "words.json"
    words, before = json.loads(record.read_text()) if record.exists() else ([], "")
    fault = "; ".join(faults(folder, code, memory, output, before))
    return Result(kind, number, code, output, time.monotonic() - began, fault, words)


def faults(folder: Path, code: int, memory: int, output: str, before: str) -> Iterator[str]:
    """Yield what is wrong with how a program ended."""
    if code == NOT_MADE:
        yield "the fuzzer could not make the input"
        return
    if code in (-signal.SIGALRM, -signal.SIGKILL, -signal.SIGXCPU):
        yield f"ran longer than {SECONDS} s"
    elif code not in (0, 2):
        yield f"exit code {code}"
    if memory > MEMORY:
        yield f"used {memory >> 20} MiB"
    if found := EXCEPTION.search(output):
        yield f"{found[0]} in the output"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if code == 2 and (not errors or not output.splitlines()[-1].startswith("error: ")):
        yield "the last line is not the error"
    # a path may have 4096, and may be named twice
    if any(len(line) > 10_000 for line in output.replace("\r", "\n").splitlines()):
        yield "a line of more than 10,000 characters"
    if (folder / RAN).exists() or (folder / "ran").exists():
        yield RAN
    if fingerprint(folder / "in") != before:
        yield "an input was changed"
    yield from unfinished(folder)


def fingerprint(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path))
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def unfinished(folder: Path) -> Iterator[str]:
    """Yield the temporary and half-written files among the outputs."""
    for path in sorted([*(folder / "out").rglob("*"), *(folder / "cache").rglob("*")]):
        name = path.relative_to(folder)
        if ".tmp" in path.name:
            yield f"{name} was left"
        reader = READERS.get(path.suffix)
        if reader and path.is_file() and (folder / "in" / path.name).exists() is False:
            try:
                reader(path)
            except Exception as error:
                yield f"{name} is half written ({error})"


def read_png(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


READERS: dict[str, Callable[[Path], object]] = {
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".pth": checkpoint.load,
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    ".yaml": load_yaml,
    ".png": read_png,
}


# ---------------------------------------------------------------- many inputs


def prepare(folder: Path) -> Bench:
    """Write the valid inputs to `folder`."""
    bench = Bench(folder.resolve())

    def run(place: Path, words: Words) -> None:
        code, _ = fork(place, lambda: run_words(words), seconds=300, memory=8 << 30)
        if code:
            raise RuntimeError(f"{' '.join(words)}:\n{(place / 'output.txt').read_text()}")

    bench.prepare(run)
    return bench


def run_all(folder: Path, chosen: Sequence[tuple[str, int]], seed: int = 0) -> list[Result]:
    """Try the inputs (kind, number), and keep the folders of those with a fault."""
    bench, results = prepare(folder / "bench"), []
    for kind, number in chosen:
        place = folder / f"{kind}-{number}".replace(" ", "-")
        results.append(try_input(kind, number, place, bench, seed))
        if results[-1].fault:
            print(f"{results[-1]}\n", flush=True)
        else:
            shutil.rmtree(place)
    return results


def every_input(step: int = 1) -> list[tuple[str, int]]:
    """Return kind and number of every input, or of every `step`-th of each kind."""
    return [(kind, number) for kind, (_, count) in KINDS.items() for number in range(0, count, step)]


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a row per kind."""
    columns = ("accepted", "refused", "faults")
    lines = ["| kind | inputs | accepted | refused with a reason | faults |", "|---|---|---|---|---|"]
    rows = [(kind, [r for r in results if r.kind == kind]) for kind in KINDS] + [("all", list(results))]
    for kind, found in rows:
        counts = Counter(result.outcome for result in found)
        lines.append(f"| {kind} | {len(found)} | {' | '.join(str(counts[column]) for column in columns)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--only", choices=list(KINDS), help="kind of the inputs to try")
    parser.add_argument("--number", type=int, help="number of the only input to try; its output is printed")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other inputs; CI uses 0")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [(kind, n) for kind, n in every_input() if given.only in (None, kind) and given.number in (None, n)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = run_all(given.keep or Path(scratch), chosen, given.seed)
    for result in results:
        if given.number is not None and not result.fault:
            print(f"{result}\n")
    if given.table:
        print(table(results))
    slowest = max(results, key=lambda result: result.seconds)
    place = f"{slowest.kind} {slowest.number}"
    print(f"{len(results)} inputs in {time.monotonic() - began:.0f} s, the slowest {slowest.seconds:.1f} s ({place})")
    return int(any(result.fault for result in results))


if __name__ == "__main__":
    sys.exit(main())
