"""What a detector leans on, where that is known."""

import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score
from token_tables import halves, token_table

from stethoscope import Detector
from stethoscope.detection.warn import mention_warnings, write_warnings
from stethoscope.report.importance import PRIOR, importances
from stethoscope.report.source import Source
from stethoscope.runs.lines import Record
from stethoscope.runs.store import RunStore
from stethoscope.runs.tokens import SCHEMA


def _source(folder, table, detector):
    """A finished run of a table, with warnings of a detector that was fitted elsewhere."""
    table = table.assign(prompt_hash="0" * 16, labeller="chair/1")
    types = {field.name: field.type for field in SCHEMA}
    schema = pa.schema([(name, types.get(name, pa.float32())) for name in table.columns])
    rows = {
        name: pa.Table.from_pandas(part, preserve_index=False).cast(schema)
        for name, part in table.groupby("sample_id", sort=False)
    }
    store = RunStore(folder)
    store.begin("chair", {"adapter": {}, "task": {"name": "chair"}})
    store.append([Record("chair", name, name, "all", "x.png", "What?") for name in rows], rows)
    store.finish("chair", list(rows))
    store.set_status("chair", "finished")
    store.write_metrics("chair", {"primary": "chair_i", "counts": {}, "metrics": []})
    write_warnings(mention_warnings(store.tokens("chair"), detector), folder / "warnings.jsonl")
    detector.save(folder / "detector")
    return Source.read(folder)


def test_importance_is_what_shuffling_costs(tmp_path):
    train, test = halves(token_table(300, seed=2))
    detector = Detector(features=["nll", "noise"], strength=1.0).fit(train)
    source = _source(tmp_path / "run", test, detector)
    found = {one.feature: one.loss for one in importances(source)}
    area = roc_auc_score(source.held_out["label"], source.held_out["probability"])
    assert found["nll"].value == pytest.approx(area - 0.5, abs=0.04)  # what is left is noise
    assert found["nll"].low > 0.1
    assert abs(found["noise"].value) < 0.02
    assert found["nll"].items == len(source.held_out)
    assert [one.loss for one in importances(source)] == [one.loss for one in importances(source)]


def test_what_place_and_name_are_worth_is_told_of_a_factored_detector(tmp_path):
    train, test = halves(token_table(300, seed=2))
    detector = Detector(features=["nll", "mass"], factored=True, strength=1.0).fit(train)
    found = {one.feature: one.loss for one in importances(_source(tmp_path / "run", test, detector))}
    assert set(found) == {"nll", "mass", PRIOR}
    assert found[PRIOR].low > 0.01


def test_a_run_without_a_detector_of_its_own_has_none(tmp_path):
    train, test = halves(token_table(100, seed=2))
    source = _source(tmp_path / "run", test, Detector(features=["nll"], strength=1.0).fit(train))
    (source.folder / "detector" / "manifest.json").unlink()
    assert importances(source) == []
