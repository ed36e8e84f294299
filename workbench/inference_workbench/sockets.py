"""Where the Unix socket of a server that we start ourselves lives: a private folder, never the temporary one.

Cleaners of the temporary folder delete sockets that look old, after which a healthy server can no longer be reached.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir

_LONGEST = 100
"""Bytes. The kernel's limit for the path of a Unix socket is 107 on Linux and 103 on macOS."""


def new_socket_path() -> Path:
    """Return an unused socket path in a folder that only this user can enter.

    Raises
    ------
    OSError
        If the folder cannot be made private, or its path is too long for a Unix socket.
    """
    name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
    candidates = [Path(jupyter_runtime_dir()) / "iw", Path.home() / ".inference-workbench"]
    for folder in candidates:
        path = folder / name
        if len(os.fsencode(path)) > _LONGEST:
            continue
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user: remove it or set JUPYTER_RUNTIME_DIR elsewhere.")
        if status.st_mode & 0o077:
            folder.chmod(0o700)
        return path
    raise OSError(
        f"No folder with a short enough path for a Unix socket (tried {', '.join(map(str, candidates))}). "
        "Set JUPYTER_RUNTIME_DIR to a short path."
    )
