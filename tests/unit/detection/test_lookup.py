"""Warnings of a detector are written as strict JSON."""

import os

import pytest

from stethoscope.detection.lookup import write_warnings


def test_warnings_are_finite(tmp_path):
    import pandas as pd

    row = {"sample_id": "s", "probability": float("nan"), "evidence": None, "prior": None, "visual_evidence": []}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_warnings(pd.DataFrame([row]), tmp_path / "warnings.jsonl")
    assert not os.listdir(tmp_path)
