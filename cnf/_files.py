"""Atomic writing of files and folders, with a digest that detects damage."""

import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BLANK_DIGEST = "0" * 64
"""Placeholder of the digest in a content, which `seal` replaces."""

_PIECE = 2**20
_LEAST_UNPACKED, _UNPACKED_PER_BYTE = 2**28, 200


def as_path(name: str, path: object) -> Path:
    """Refuse anything but a str or path that can be a file name; the file need not exist."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be a str or a pathlib.Path; got {type(path).__name__}. Give a name, such "
            "as 'runs/first'."
        )
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a name that a file can have; got {text!r}.")
    return Path(text)


def check_path(name: str, path: object) -> Path:
    """Refuse anything but the path of an ordinary file, which need not exist."""
    file = as_path(name, path)
    if file.is_dir():
        raise ValueError(f"{name} must be a file; {str(file)!r} is a folder. Name a file in it.")
    if file.exists() and not file.is_file():
        raise ValueError(f"{name} must be an ordinary file; {str(file)!r} is none.")
    return file


def write_atomically(path: str | os.PathLike[str], content: bytes, *, replace: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    A symbolic link stays: its target is written.

    Raises:
        OSError: If the file cannot be written, or exists and `replace` is False; it names the file.
    """
    path = Path(os.path.realpath(check_path("path", path)))
    _check_parent(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _naming(path):
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                _link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class TooLargeError(ValueError):
    """A small file asks for too much memory."""


def check_unpacked(path: Path, size: int) -> None:
    """Raise a TooLargeError for a file whose stated `size` is far beyond its size on disk.

    The limit is 256 MiB, or 200 bytes for each byte of the file.
    """
    packed = path.stat().st_size
    if size > max(_LEAST_UNPACKED, _UNPACKED_PER_BYTE * packed):
        raise TooLargeError(
            f"{path} states that its {packed:,} bytes unpack to {size:,}, which no table does. If "
            "you trust it, write it again without compression, in parts if necessary."
        )


def seal(content: bytes) -> bytes:
    """Return the content with its SHA-256 in place of the first `BLANK_DIGEST`."""
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(BLANK_DIGEST.encode(), digest.encode(), 1)


def is_intact(path: Path, digest: object) -> bool:
    """Return whether a file is unchanged since `seal`, with this digest in its first megabyte."""
    return digest_of(path, blanked=str(digest)) == digest


def digest_of(path: Path, *, blanked: str = BLANK_DIGEST) -> str:
    """Return the SHA-256 of a file, with a `BLANK_DIGEST` in place of the first `blanked`."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(_PIECE)
        found.update(head.replace(blanked.encode(), BLANK_DIGEST.encode(), 1))
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


@contextmanager
def new_folder(
    path: str | os.PathLike[str], *, check_old: Callable[[Path], None]
) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `path` if the block ends without an error.

    Args:
        path: The folder to make.
        check_old: Called with the old folder before it is replaced, at `path` and once more after
            it is moved away; an error leaves it as it is.

    Raises:
        OSError: If the folder cannot be made; it names the folder.
    """
    path = Path(path).resolve()
    _check_parent(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new, old = temporary / "new", temporary / "old"
    with _naming(path):
        temporary.mkdir(mode=0o700)
        try:
            new.mkdir()
            yield new
            if path.exists():
                check_old(path)
                path.rename(old)
                check_old(old)
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def left_over(path: str | os.PathLike[str]) -> Path | None:
    """Return the place of the old folder, if the computer stopped while it was being replaced."""
    path = Path(path).resolve()
    return next(path.parent.glob(f".{glob.escape(path.name)}.*/old"), None)


def _link(temporary: Path, path: Path) -> None:
    """Give a file a second name, unless a file of that name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(
            f"the file {str(path)!r} exists by now; it was not replaced."
        ) from None
    except OSError:  # the file system has no links
        if path.exists():
            raise
        temporary.replace(path)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(path.parent)!r} to write {path.name!r} to."
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make errors of the system name the target, not a temporary file or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{os.strerror(error.errno)}; nothing was written to"
        raise OSError(error.errno, reason, str(path)) from error
