"""Who may come in: everybody on this machine, or those with a password."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from studio.errors import RequestError


def users_for(host: str, auth: Path | None) -> list[tuple[str, str]] | None:
    """Who may come in; None is everybody on this machine. Raises RequestError."""
    users = read_users(auth) if auth is not None else None
    if users is None and not is_loopback(host):
        raise RequestError(
            f"'{host}' can be reached by others, and there is no password",
            "add --auth FILE with lines of the form name:password, or use --host 127.0.0.1",
        )
    return users


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_users(path: Path) -> list[tuple[str, str]]:
    """Lines `name:password`. Raises RequestError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        readable = path.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read '{path}': {error}") from None
    if readable:
        raise RequestError(f"others on this machine can read the passwords in '{path}'", f"run: chmod 600 {path}")
    users = [(name, password) for name, colon, password in (line.partition(":") for line in lines) if colon]
    if not users or not all(name and len(password) >= 8 for name, password in users):
        raise RequestError(f"'{path}' holds no usable password", "write lines name:password, 8 characters or more")
    return users
