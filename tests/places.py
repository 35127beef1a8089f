"""Where the tests find the repository and their sample files; importing it loads nothing else."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SAMPLES = TESTS / "samples"
