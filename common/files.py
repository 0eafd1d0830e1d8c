"""Files that are whole or not there, errors that name the file, folders that one process has to itself."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of a file system that has none


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Turn an OSError within the block into an InputError that says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the block a temporary path beside `path`, and rename what it wrote there to `path` at the end.

    So `path` holds all of the new content or what it held before, also after a crash or a power cut. The folder is made
    where it is missing. When the block fails, the temporary file is removed.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with naming_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def save_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. InputError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Let what was written to a file, or the names in a folder, outlast a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def lock_folder(folder: Path, patience: float = 0.0) -> Iterator[int | None]:
    """A lock on a folder, as a file descriptor that programs may inherit: it is theirs even when this process is killed
    and they go on. None where another process has it, after `patience` seconds. The system lets it go with its last
    holder."""
    with contextlib.ExitStack() as stack:
        with naming_errors(folder / ".lock"):
            number = stack.enter_context(open(folder / ".lock", "w")).fileno()
            locked = _lock(number)
            until = time.monotonic() + patience
            while not locked and time.monotonic() < until:
                time.sleep(0.2)
                locked = _lock(number)
        yield number if locked else None


def _lock(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def check_writable(folder: Path) -> None:
    """Make the folder where it is missing; InputError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as hex digits. OSError when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(parts: Iterable[Any]) -> str:
    """16 hex digits that are others when a part is, or their order."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
