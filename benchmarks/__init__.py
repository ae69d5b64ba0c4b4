"""The benchmark suite. Correctness is the tests' own rule, so that their oracle is imported."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # as pytest does

# The exit status of a program that measured all it did without a failure, and not all there is.
OUT_OF_TIME = 3
