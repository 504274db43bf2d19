"""Writing files and folders: whole, or not at all."""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes, *, replace: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half.

    Raises:
        OSError: If the file cannot be written, or is there and `replace` is False.
    """
    path = Path(path)
    _check_parent(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes files private
        if replace:
            Path(temporary).replace(path)
        else:
            _link(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


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
        OSError: If the folder cannot be made.
    """
    path = Path(path).resolve()
    _check_parent(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        new.chmod(0o777 & ~_umask())
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


def _link(temporary: str, path: Path) -> None:
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
        Path(temporary).replace(path)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(path.parent)!r} to write {path.name!r} to."
        )


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
