"""Files that survive a kill and a power cut: hashed, synced to the disk, and replaced whole or not at all; and text."""

import errno
import hashlib
import os
import platform
from pathlib import Path

from acorn import UserError


def lock(folder: Path, doing: str):
    """Keep other processes that ask for the same lock out of `folder` for as long as the returned file is open; the
    system opens it again when this process ends, however it ends. Raises UserError where another process has it."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115 (it stays open)
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
    with open(path, "rb") as file:
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
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def read_text(path: str) -> str:
    """The text of a small UTF-8 file. Raises UserError, which names it, where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"the file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the file {path} is not UTF-8 at byte {error.start}") from error
