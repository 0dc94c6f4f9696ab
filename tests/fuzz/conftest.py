"""Hypothesis for fuzzing: a short profile in the suite, longer ones from ``tests/slow/fuzz.py``."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = os.environ.get("STETHOSCOPE_FUZZ_EXAMPLES")

settings.register_profile(
    "fuzz",
    max_examples=int(EXAMPLES or 40),
    derandomize=EXAMPLES is None,  # the suite says the same of the same code; the script looks for more
    deadline=None,  # on a busy machine a single example may take any time
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
