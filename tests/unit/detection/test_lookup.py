"""Warnings of a detector are written as strict JSON."""

import json
import os
from importlib.resources import files

import pytest

from stethoscope.detection.lookup import WARNING_COLUMNS, write_warnings


def test_warnings_are_finite(tmp_path):
    import pandas as pd

    row = {"sample_id": "s", "probability": float("nan"), "evidence": None, "prior": None, "visual_evidence": []}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_warnings(pd.DataFrame([row]), tmp_path / "warnings.jsonl")
    assert not os.listdir(tmp_path)


def test_the_schema_of_warnings_has_all_keys_of_a_line():
    schema = json.loads((files("stethoscope.core") / "schemas" / "warnings.schema.json").read_text("utf-8"))
    assert set(schema["properties"]) == set(WARNING_COLUMNS)
