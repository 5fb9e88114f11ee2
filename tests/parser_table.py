"""The table of `fuzz_parsers.py`: every file that the package reads, what writes a whole one, and what reads it."""

from parsers_of_artifacts import ARTIFACTS
from parsers_of_data import DATA
from parsers_of_runs import RUNS

PARSERS = [*ARTIFACTS, *DATA, *RUNS]
