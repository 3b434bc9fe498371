"""Where an export goes: written beside its place, renamed when it is proven, so that `out` is whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from studio.errors import DiskError, RequestError
from studio.files import disk_error

REPORT_NAME = "export.json"  # in every exported folder; by it `--force` knows what it may replace


def is_free(out: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not any(out.iterdir()) if out.is_dir() else not (out.exists() or out.is_symlink())


def refuse_existing(out: Path, force: bool) -> None:
    """Raises RequestError if `out` is there: always, or with `force` if it is no export that may be replaced."""
    if is_free(out):
        return
    if not force:
        raise RequestError(f"'{out}' is already there", "choose another --out, or add --force to replace it")
    replaceable = (out / REPORT_NAME).is_file() if out.is_dir() else out.suffix == ".safetensors"
    if not replaceable or out.is_symlink():
        raise RequestError(f"'{out}' is no export, so --force does not replace it", "choose another --out")


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed at the end whatever happens. Raises DiskError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise disk_error(out, error) from error
    try:
        yield folder
    except OSError as error:
        raise disk_error(out, error) from error
    except SafetensorError as error:
        raise DiskError(f"cannot write '{out}': {error}", "free some space or choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(made: Path, out: Path) -> None:
    """Renames `made` to `out`; an earlier export there is set aside first and removed after."""
    if made.is_dir():
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
    if not out.is_dir():
        made.replace(out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    out.replace(aside / out.name)
    made.replace(out)
    shutil.rmtree(aside, ignore_errors=True)
