"""The command: `python -m fused_lora`, torchrun --nproc-per-node 2 -m -- fused_lora."""

import sys

from .interrupt import restore


def main() -> None:
    """Runs the command line, or says what it needs."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"fused-lora: needs {error.name}: pip install 'fused-lora[demo]'")
    restore()
    run()


if __name__ == "__main__":
    main()
