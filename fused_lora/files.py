"""Writing files so that one that exists is whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Calls ``write`` with the name of a temporary file beside ``path``, then moves it there.

    Whoever reads ``path`` meanwhile sees the old file or the new one. If ``write`` raises, the
    temporary file goes and the old one stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(handle).st_mode  # what the process's umask makes of it
    os.close(handle)
    try:
        write(str(temporary))
        temporary.chmod(mode)  # safetensors puts a file of its own there, for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
