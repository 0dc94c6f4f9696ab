"""Hypothesis for fuzzing: a short profile in the suite, longer ones from ``scripts/fuzz.py``."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("STETHOSCOPE_FUZZ_EXAMPLES", "40")),
    deadline=None,  # on a busy machine a single example may take any time
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
