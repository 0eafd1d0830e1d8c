"""Write files completely or not at all, report errors with the file's name, lock folders, compute hashes."""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError

# How a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def naming_errors(path: str | Path, problem: str = "cannot be written") -> Iterator[None]:
    """Turn an OSError within the block into an InputError with `path`, the problem and the reason."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {problem} ({error.strerror or error})") from None


@contextlib.contextmanager
def naming_read_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError within the block into an InputError: `path` does not exist, or cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    # no permission, a loop of symbolic links, a name that is too long
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename the file written there to `path` at the end of the block.

    Afterwards `path` holds either its previous content or all of the new one, also after a crash or a power cut. A
    missing folder is created. If the block fails, the temporary file is removed.

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


def remove_temporary(folder: Path) -> None:
    """Remove what `replacing` left in `folder` when its process was killed, whatever the file.

    A file that another process is writing there at this moment is removed too, and that process reports an error:
    call it as the holder of the folder's lock.
    """
    for path in folder.glob(".*." + "[0-9a-f]" * 8 + ".tmp"):
        path.unlink(missing_ok=True)


def save_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, completely or not at all. Raise InputError if it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_folder(folder: Path, timeout: float = 0.0) -> Iterator[int | None]:
    """Lock a folder for the duration of the block, and yield the lock's file descriptor.

    Child processes may inherit the descriptor (`pass_fds`). The system releases the lock when its last holder ends,
    whichever way it ends. A file system without locks counts as unlocked.

    Args:
        folder: an existing folder.
        timeout: seconds to wait for another process to release the lock.

    Yields:
        The descriptor, or None if another process still holds the lock.

    Raises:
        InputError: the lock file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with naming_errors(folder / ".lock"):
            descriptor = stack.enter_context(open(folder / ".lock", "w")).fileno()
            locked = try_lock(descriptor)
            until = time.monotonic() + timeout
            while not locked and time.monotonic() < until:
                time.sleep(0.2)
                locked = try_lock(descriptor)
        yield descriptor if locked else None


def try_lock(descriptor: int) -> bool:
    """Return whether this process holds the lock of an open file from now on. True if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def check_writable(folder: Path) -> None:
    """Create the folder if it is missing, and raise InputError unless a file can be written there."""
    with naming_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def nearest_folder(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest folder above it that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_creatable(folder: Path) -> None:
    """Raise InputError unless the folder can be created, or written to where it exists. Nothing is written."""
    nearest = nearest_folder(folder)
    with naming_errors(folder):
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission in {nearest}")


def check_regular(path: str | Path) -> None:
    """Raise OSError if `path` is a pipe or a device, whose content may have no end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file")


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raise OSError if it cannot be read, or is not a regular file."""
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(parts: Iterable[Any], digits: int = 16) -> str:
    """Return hexadecimal digits that depend on the text of every part and on their order."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:digits]
