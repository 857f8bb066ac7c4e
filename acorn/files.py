"""Files that survive a kill and a power cut: hashed, synced to the disk, and replaced whole or not at all; and files
in a stranger's folder: never written or deleted through a link, and read only where they are regular files."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
from pathlib import Path
from typing import IO, BinaryIO

from acorn import UserError

MOST = 1 << 27  # bytes of a JSON file; the largest, with a tokenizer of 256,000 tokens inside, have a third of it
DEPTH = 100  # of nested lists and objects in a JSON file; what reads one recursively is safe below it


def lock(folder: Path, doing: str):
    """Keep other processes that ask for the same lock out of `folder` for as long as the returned file is open; the
    system opens it again when this process ends, however it ends. Raises UserError where another process has it."""
    file = open_own(folder / ".lock", "a+")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return file
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return file  # a file system without locks
        file.seek(0)
        holder = file.read(100).strip() or "another process"
        raise UserError(f"{folder} is in use: {holder} is {doing} it; wait for it, or choose another folder") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """Put a file, or the names in a folder, on the disk. Windows opens no folders, and some network filesystems sync
    none: there the names are as safe as that system makes them."""
    is_folder = os.path.isdir(path)
    if os.name == "posix" or not is_folder:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        finally:
            os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    with create(beside) as file:
        file.write(text.encode())
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def create(path: str | Path) -> BinaryIO:
    """Open a new, empty file for writing. A file or a link of that name is removed first; a link's target stays."""
    Path(path).unlink(missing_ok=True)
    return open(path, "xb")


def open_own(path: str | Path, mode: str) -> IO:
    """Open a file that is to be changed, as open(path, mode) does. Raises OSError for a link, whose target would change
    instead, and for what is not a regular file."""
    with contextlib.suppress(FileNotFoundError):
        kind = os.lstat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # of a folder, the system says that it is one
            word = "a symbolic link, whose target is not written to" if stat.S_ISLNK(kind) else "not a regular file"
            raise OSError(errno.EINVAL, f"it is {word}; remove it", str(path))
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | no_follow, 0o666))


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a file, a folder with all that is in it, or a link without its target; nothing where none of them is."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise


def make_folder(path: Path) -> None:
    """Make a folder where there is none; a link of that name is removed first."""
    if path.is_symlink():
        with contextlib.suppress(OSError):  # another process did it just now, and made the folder
            path.unlink()
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.EEXIST, "it is a symbolic link, whose target is not written to; remove it", str(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises OSError for a FIFO, a socket or a device, where opening or reading may wait."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # of a folder, the system says that it is one
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(path, "rb")


def read_bytes(path: str | Path, most: int = MOST) -> bytes:
    """The content of a regular file. Raises OSError where it has more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def read_json(path: str | Path):
    """The value in a JSON file. Raises OSError where it cannot be read, and ValueError where it is not JSON, or nested
    more than DEPTH times."""
    try:
        value = json.loads(read_bytes(path))
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply, or too large") from error
    level, depth = [[value]], 0
    while level:
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} times")
        inside = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level, depth = [child for child in inside if isinstance(child, (dict, list))], depth + 1
    return value


def read_text(path: str) -> str:
    """The text of a small UTF-8 file. Raises UserError, which names it, where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"the file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the file {path} is not UTF-8 at byte {error.start}") from error
