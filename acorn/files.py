"""File operations that survive a kill or power loss (hashes, sync, atomic replacement) and that are safe in an
untrusted folder: no writing or deleting through links, and reading of regular files only."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO

from acorn import UserError

MAX_JSON_BYTES = 1 << 27  # bytes of a JSON file; a tokenizer of 256,000 tokens takes a third of it
MAX_JSON_DEPTH = 100  # nesting levels in a JSON file; small enough for recursive readers


def lock(folder: Path, activity: str):
    """Lock `folder` against other processes that call this, for as long as the returned file is open.

    The system releases the lock when this process ends for any reason. `activity` describes the use for messages, such
    as "training into". Raises UserError if another process holds the lock. On Windows and on file systems without
    locks, nothing is locked."""
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
        raise UserError(f"{folder} is in use: {holder} is {activity} it. Wait, or choose another folder.") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def unlock(file: IO) -> None:
    """Release the lock that `lock` returned, and remove its file."""
    try:
        Path(file.name).unlink(missing_ok=True)
    except PermissionError:  # Windows does not remove an open file
        file.close()
        Path(file.name).unlink(missing_ok=True)
    file.close()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file, which is read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """Sync a file, or the directory entries of a folder, to disk. Folders are skipped on Windows, which cannot open
    them, and on network file systems that cannot sync them."""
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
    """Write a text file atomically."""
    tmp_path = path.with_name(f".{path.name}.writing")
    try:
        with create(tmp_path) as file:
            file.write(text.encode())
        sync(tmp_path)
        os.replace(tmp_path, path)
    except OSError as error:
        remove(tmp_path, ignore_errors=True)
        # the OSError of a failed write has no filename
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def create(path: str | Path) -> BinaryIO:
    """Open a new, empty file for writing. An existing file or link is removed first, but not a link's target."""
    Path(path).unlink(missing_ok=True)
    return open(path, "xb")


def open_own(path: str | Path, mode: str) -> IO:
    """Open a file to change it, like open(path, mode). Raises OSError for a link, whose target would be changed, and
    for anything else that is not a regular file."""
    with contextlib.suppress(FileNotFoundError):
        kind = os.lstat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # for a folder, `open` raises a clear error
            problem = "a symbolic link, whose target is not written to" if stat.S_ISLNK(kind) else "not a regular file"
            raise OSError(errno.EINVAL, f"it is {problem}; remove it", str(path))
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | no_follow, 0o666))


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a file, a folder with its content, or a link without its target. Does nothing if the path is missing."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise


def make_folder(path: Path) -> None:
    """Make a folder if it does not exist. A link of that name is removed first."""
    if path.is_symlink():
        with contextlib.suppress(OSError):  # another process may just have replaced the link by the folder
            path.unlink()
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.EEXIST, "it is a symbolic link, whose target is not written to; remove it", str(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises OSError for a FIFO, socket or device, because opening or reading might block."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # for a folder, `open` raises a clear error
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(path, "rb")


def read_bytes(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file. Raises OSError if it has more than `max_bytes` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, max_bytes) + 1)  # `read` reserves memory for the number of bytes that it is given
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return content


def read_json(path: str | Path):
    """Return the value in a JSON file. Raises OSError if the file cannot be read, and ValueError if it is not JSON or
    has more than MAX_JSON_DEPTH nesting levels."""
    try:
        value = json.loads(read_bytes(path))
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply or too large") from error
    level: list[dict | list] = [[value]]
    depth = 0
    while level:
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"it has more than {MAX_JSON_DEPTH} nesting levels")
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level, depth = [child for child in children if isinstance(child, (dict, list))], depth + 1
    return value


def read_text(path: str) -> str:
    """Return the text of a small UTF-8 file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"the file {path} cannot be read: {error.strerror}. Give another path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the file {path} is not UTF-8 at byte {error.start}. Convert it to UTF-8.") from error


def parse_json_line(text: str, location: str):
    """Return the value in a line of a .jsonl file. Raises UserError, which names the location, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is not valid JSON ({error}). A .jsonl file has one object per line.") from error


def read_json_lines(path: str, limit: int = 0) -> list[tuple[str, Any]]:
    """Return the first `limit` values (0: all) of a small .jsonl file, each with its location ("line 3 of FILE").

    Raises UserError if a line is not JSON, and if there is none."""
    lines = [(f"line {i} of {path}", line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty. Write one JSON object per line.")
    return [(location, parse_json_line(line, location)) for location, line in lines[: limit or None]]
