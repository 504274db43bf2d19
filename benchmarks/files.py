"""Files of results."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(text.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
