"""Ctrl-C while the command's imports run: the package imports this before anything that is slow.

No traceback then, and 130 as the exit status. `__main__` takes it back when they are done: until
then nothing has been read or written. A program that imports the library keeps its own handler.
"""

import os
import signal
import sys


def _quit(*_: object) -> None:
    os._exit(130)


def restore() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_is_command = sys.orig_argv[1:3] == ["-m", "fused_lora"] or (
    sys.argv[:1] != [] and os.path.basename(sys.argv[0]) == "fused-lora"
)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _quit)
