"""Writing files and folders, whole or not at all, with a digest that tells damage."""

import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BLANK_DIGEST = "0" * 64
"""Stands in a content for its digest, until `seal` puts that in its place."""

_PIECE = 2**20
_LEAST_UNPACKED, _UNPACKED_PER_BYTE = 2**28, 200


def as_path(name: str, path: object) -> Path:
    """Refuse what is no path, whatever may be there.

    Raises:
        TypeError: If it is neither a text nor a path.
        ValueError: If no file can have such a name.
    """
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
    """Refuse what is no path of a file, there or not.

    Raises:
        TypeError: If it is neither a text nor a path.
        ValueError: If it is empty, of a folder, or of what is no ordinary file.
    """
    file = as_path(name, path)
    if file.is_dir():
        raise ValueError(f"{name} must be a file; {str(file)!r} is a folder. Name a file in it.")
    if file.exists() and not file.is_file():
        raise ValueError(f"{name} must be an ordinary file; {str(file)!r} is none.")
    return file


def write_atomically(path: str | os.PathLike[str], content: bytes, *, replace: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half.

    A symbolic link stays: the file that it points at is written.

    Raises:
        OSError: If the file cannot be written, or is there and `replace` is False; it names the
            file.
        TypeError: If `path` is no path.
        ValueError: If it is a folder, or no ordinary file.
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
    """A small file asks for much memory."""


def check_unpacked(path: Path, size: int) -> None:
    """Refuse a file whose content takes far more memory than its own size lets expect.

    Args:
        path: The file.
        size: Bytes that its content takes, as it says itself.

    Raises:
        TooLargeError: If these are more than 256 MiB and more than 200 for each byte of the file.
    """
    packed = path.stat().st_size
    if size > max(_LEAST_UNPACKED, _UNPACKED_PER_BYTE * packed):
        raise TooLargeError(
            f"{path} says that its {packed:,} bytes unpack to {size:,}, which no table does. If "
            "you trust it, write it again without compression, in parts if need be."
        )


def seal(content: bytes) -> bytes:
    """The content with its SHA-256 in the place of the first `BLANK_DIGEST`."""
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(BLANK_DIGEST.encode(), digest.encode(), 1)


def is_intact(path: Path, digest: object) -> bool:
    """Whether a file is as `seal` left it, with this digest in its first megabyte."""
    return digest_of(path, blanked=str(digest)) == digest


def digest_of(path: Path, *, blanked: str = BLANK_DIGEST) -> str:
    """SHA-256 of a file, as if it had a `BLANK_DIGEST` where `blanked` comes first."""
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
    """A temporary folder beside `path`, which takes its place if the block ends without an error.

    What was at `path` is removed then, and not before.

    Args:
        path: The folder to make.
        check_old: Raises an error, which leaves all as it is, if what is at `path` shall stay. It
            is asked once where that stands, and once more when it is out of anybody's reach.

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
    """Where the old folder stands, if the computer stopped when `new_folder` was replacing it."""
    path = Path(path).resolve()
    return next(path.parent.glob(f".{glob.escape(path.name)}.*/old"), None)


def _link(temporary: Path, path: Path) -> None:
    """Give a file a second name, unless there is a file of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(
            f"there is a file {str(path)!r} by now; it was not replaced."
        ) from None
    except OSError:  # of a file system without links
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
    """Let errors of the system name what was to be written, not a temporary file or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{os.strerror(error.errno)}; nothing was written to"
        raise OSError(error.errno, reason, str(path)) from error
