"""Where the runtime keeps what it makes for this device: native libraries, packed weights.

What lies there is loaded into the process, so it is only taken from folders and files that nobody
else can have written: they belong to this user or to root, and nobody else may write to them.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from edge_kv.errors import RuntimeFault

CACHE_VARIABLE = "EDGE_KV_CACHE"


def cache_directory() -> Path:
    """$EDGE_KV_CACHE, else $XDG_CACHE_HOME/edge-kv, else ~/.cache/edge-kv; made when needed.

    A process without a home directory gets a folder of its user's below the temporary directory.
    """
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no $HOME and no entry in the user database
        return Path(tempfile.gettempdir()) / f"edge-kv-{_user()}"
    return home / "edge-kv"


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache directory, made if needed, of this user's or root's own.

    Raises:
        RuntimeFault: it cannot be made, or another user can write to it.
    """
    path = cache_directory() / name
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (path.parent, path):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        if not os.path.isdir(path):  # unlike Path.is_dir, false where it may not look
            raise RuntimeFault(
                f"Cannot make the cache directory {path} ({e.strerror}); "
                f"set {CACHE_VARIABLE} to another."
            ) from e
    for part in (path.parent, path):
        require_own(part)
    return path


def require_own(path: Path) -> None:
    """Refuse a cached file or folder that another user may have written.

    Raises:
        RuntimeFault: it belongs to somebody else or can be written by others, or is missing.
    """
    try:
        held = path.stat()
    except OSError as e:
        raise RuntimeFault(f"Cannot read {path} ({e.strerror}).") from e
    if not hasattr(os, "getuid"):  # Windows: a user's cache folder is that user's alone
        return
    writers = stat.S_IWOTH  # a group of this user's own is this user
    if held.st_gid != os.getgid():
        writers |= stat.S_IWGRP
    if held.st_uid not in (0, os.getuid()):
        reason = f"belongs to user {held.st_uid}"
    elif held.st_mode & writers:
        reason = f"can be written by others (mode {stat.S_IMODE(held.st_mode):o})"
    else:
        return
    raise RuntimeFault(
        f"{path} {reason}, so what it holds is not loaded; make it your own (chmod go-w), or set "
        f"{CACHE_VARIABLE} to a directory of yours."
    )


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"
