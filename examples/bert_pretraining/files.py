"""Files as the example reads and writes them: UTF-8, whole or not at all, one writer a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from errors import UserError

#: Prefix of what has no name of its own yet.
TEMPORARY = ".writing-"
LOCK = ".lock"


def decode_utf8(
    content: bytes,
    path: Path | str,
    option: str,
    *,
    offset: int = 0,
    replace: bool = False,
    advice: str = "convert it",
) -> str:
    """Text of bytes of a file, less a byte order mark at its beginning.

    Args:
        content: The bytes.
        path: The file, for errors.
        option: That named it, for errors.
        offset: Place of the bytes in the file.
        replace: Puts U+FFFD in the place of what is no UTF-8.
        advice: What the user can do about that otherwise.
    """
    if b"\0" in content:
        raise UserError(
            f"{option}: {path} is a binary file, not text (it has a NUL at byte "
            f"{offset + content.index(0)})."
        )
    try:
        text = content.decode("utf-8", "replace" if replace else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}: {path} is not UTF-8 text (byte {offset + error.start} cannot be decoded); "
            f"{advice}."
        ) from error
    return text if offset else text.removeprefix("\ufeff")


def read_utf8(path: Path, option: str) -> str:
    """The content of a text file that `option` named."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{option}: cannot read {path}: {error.strerror}.") from error
    return decode_utf8(content, path, option)


def write_synced(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file by `write` and returns when its bytes are on the disk."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, path: Path) -> None:
    """Gives a synced file its name, which outlasts a failure of the machine from then on."""
    os.replace(temporary, path)
    # Only POSIX systems open directories.
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whenever the machine stops."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    write_synced(temporary, lambda file: file.write(content))
    publish(temporary, path)


def is_leftover(path: Path) -> bool:
    """Whether a file is what a lock or a killed `write_atomically` leaves in a folder."""
    return path.name == LOCK or path.name.startswith(TEMPORARY)


def is_free(folder: Path) -> bool:
    """Whether a folder is missing, or holds leftovers alone."""
    return not folder.is_dir() or all(map(is_leftover, folder.iterdir()))


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps other processes from working in a folder.

    Yields:
        A file descriptor: the lock lasts as long as a process has it open, however it ends.
    """
    import fcntl

    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _at_work(folder) from error
        yield file.fileno()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """As `locked`, but for this process alone: what it has started may outlive it.

    Keeps nobody out where the platform or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _at_work(folder) from error
        yield


def _at_work(folder: Path) -> UserError:
    return UserError(f"--out: another process is at work in {folder}.")
