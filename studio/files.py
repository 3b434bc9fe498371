"""Writing files so that a crash, a full disk or a second process never leaves half of one; names that are safe."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import unicodedata
from pathlib import Path

from studio.errors import DiskError, RequestError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a temporary file beside `path`, flushes it to the disk and renames it. Raises DiskError."""
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C, too
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(path, error) from error
        raise


def disk_error(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"cannot write '{path}': {error.strerror or error}", "free some space or choose another folder, then run again"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def slug(name: str) -> str:
    """`name` if it is a plain name (letters, digits, dot, dash, underscore). Raises RequestError for any other."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name) or ".." in name:
        raise RequestError(
            f"'{name}' cannot be a name: use letters, digits, '.', '-' and '_' (80 at most), beginning with one of the "
            "first two",
            hint=f"for example '{slugify(name)}'",
        )
    return name


def slugify(text: str) -> str:
    """A plain name near to any text."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9_-]+", "-", ascii_text)).strip("-_")[:60] or "unnamed"


def is_pickle(path: Path) -> bool:
    """Whether a file begins as pickles and torch's zip archives do. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, which may look like anything, and then a brace.
    return start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
