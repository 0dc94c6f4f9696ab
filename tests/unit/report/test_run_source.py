"""A run read back: what its detector leans on, and a detector that a kill has left in parts."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers.made_up_runs import made_up_run
from helpers.token_tables import halves, token_table
from sklearn.metrics import roc_auc_score

from stethoscope import Detector
from stethoscope.core.errors import ArtefactError
from stethoscope.core.token_table import KEY_COLUMNS, mention_rows
from stethoscope.detection.detector_results import DetectorResults, Leaderboard
from stethoscope.detection.lookup import mention_warnings, write_warnings
from stethoscope.report.run_source import PRIOR, RunReader, importances
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.tokens import SCHEMA


def _source(folder, table, detector, warned=None):
    """Make a finished run from a table, with warnings of a detector that was fitted elsewhere."""
    table = table.assign(prompt_hash="0" * 16, labeller="chair/1")
    types = {field.name: field.type for field in SCHEMA}
    schema = pa.schema([(name, types.get(name, pa.float32())) for name in table.columns])
    rows = {
        name: pa.Table.from_pandas(part, preserve_index=False).cast(schema)
        for name, part in table.groupby("sample_id", sort=False)
    }
    store = RunStore(folder)
    store.open_task("chair", {"adapter": {}, "task": {"name": "chair"}})
    store.append([Record("chair", name, name, "all", "x.png", "What?") for name in rows], rows)
    store.finish("chair", list(rows))
    store.set_status("chair", "finished")
    store.write_metrics("chair", {"primary": "chair_i", "counts": {}, "metrics": []})
    judged = store.tokens("chair")[[*KEY_COLUMNS, *detector.schema.names]]
    if warned is not None:
        judged = judged[judged["sample_id"].isin(warned["sample_id"])]
    write_warnings(mention_warnings(judged, detector), folder / "warnings.jsonl")
    detector.save(folder / "detector")
    return RunReader.read(folder)


def test_importance_is_what_shuffling_costs(tmp_path):
    train, test = halves(token_table(300, seed=2))
    detector = Detector(features=["nll", "noise"], C=1.0).fit(train)
    source = _source(tmp_path / "run", test, detector)
    losses = {entry.feature: entry.loss for entry in importances(source)}
    area = roc_auc_score(source.held_out["label"], source.held_out["probability"])
    assert losses["nll"].value == pytest.approx(area - 0.5, abs=0.04)  # what is left is noise
    assert losses["nll"].low > 0.1
    assert abs(losses["noise"].value) < 0.02
    assert losses["nll"].items == len(source.held_out)
    assert [entry.loss for entry in importances(source)] == [entry.loss for entry in importances(source)]


def test_what_place_and_name_are_worth_is_told_of_a_factored_detector(tmp_path):
    train, test = halves(token_table(300, seed=2))
    detector = Detector(features=["nll", "mass"], factored=True, C=1.0).fit(train)
    losses = {entry.feature: entry.loss for entry in importances(_source(tmp_path / "run", test, detector))}
    assert set(losses) == {"nll", "mass", PRIOR}
    assert losses[PRIOR].low > 0.01


def test_a_run_without_a_detector_of_its_own_has_none(tmp_path):
    train, test = halves(token_table(100, seed=2))
    source = _source(tmp_path / "run", test, Detector(features=["nll"], C=1.0).fit(train))
    (source.folder / "detector" / "manifest.json").unlink()
    assert importances(source) == []


def test_the_mention_number_is_part_of_place_and_name(tmp_path):
    random = np.random.default_rng(3)
    table = token_table(300, seed=2, signal=0, prior=False)
    later = (table["mention_index"] >= 2) & (table["label"] >= 0)
    label = np.where(random.random(len(table)) < 0.1, ~later, later).astype(np.int8)
    table = table.assign(label=np.where(table["label"] >= 0, label, -1), token=random.permutation(len(table)) % 30)
    train, test = halves(table)
    detector = Detector(features=["noise"], factored=True, C=1.0).fit(train)
    losses = {entry.feature: entry.loss for entry in importances(_source(tmp_path / "run", test, detector))}
    assert losses[PRIOR].value > 0.25


def test_only_what_the_detector_was_measured_on_and_reads_counts(tmp_path):
    train, test = halves(token_table(300, seed=2))
    detector = Detector(C=1.0).fit(train.drop(columns=["mass"]))  # of a part of the columns
    other = test.assign(
        sample_id="other/" + test["sample_id"], label=np.where(test["label"] >= 0, 1 - test["label"], -1)
    )
    source = _source(tmp_path / "run", pd.concat([test, other]), detector, warned=test)
    losses = {entry.feature: entry.loss for entry in importances(source)}
    assert set(losses) == {"nll", "noise", "position"}
    assert losses["nll"].items == len(mention_rows(test))


def test_a_table_with_other_features_has_no_importance_and_says_so(tmp_path):
    train, test = halves(token_table(100, seed=2))
    detector = Detector(features=["nll"], C=1.0).fit(train)
    source = _source(tmp_path / "run", test, detector)
    source.__dict__["table"] = source.table.drop(columns="nll")
    with pytest.warns(UserWarning, match="lacks 1 column that its detector reads"):
        assert importances(source) == []


COUNTS = ("samples", "ok", "unparsed", "failed", "truncated")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["detector", "warnings", "metrics"])
def test_a_kill_while_a_detector_is_replaced_leaves_an_unfinished_run(tmp_path, monkeypatch, moment):
    from stethoscope.detection import leaderboard, training
    from stethoscope.detection.training import fit

    monkeypatch.setattr(leaderboard, "SHUFFLES", 2)
    run = made_up_run(tmp_path / "run")
    store = RunStore(run)
    store.write_metrics("chair", {"primary": "a", "counts": dict.fromkeys(COUNTS, 0), "metrics": []})
    shares = (0.6, 0.2, 0.2)
    fit(store, "chair", Detector(), shares, 0)
    assert RunReader.read(run).detector
    assert store.status() == {"chair": "finished"}

    class Killed(BaseException):
        pass

    def kill(*arguments, **more):
        raise Killed

    module, name = {
        "detector": (Detector, "save"), "warnings": (training, "write_warnings"),
        "metrics": (RunStore, "write_metrics"),
    }[moment]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill)
        with pytest.raises(Killed):
            fit(store, "chair", Detector(C=0.5), shares, 0)
    with pytest.raises(ArtefactError, match="has parts of two detectors: fitting one was cut short"):
        RunReader.read(run)
    fit(store, "chair", Detector(C=0.5), shares, 0)
    assert RunReader.read(run).detector


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_warnings_that_are_gone_are_one_line(tmp_path, content):
    table = token_table(100)
    source = _source(tmp_path, table, Detector(features=["mass"]).fit(table))
    results = DetectorResults({}, Leaderboard((), (), {}, {}), (), {})
    (tmp_path / "warnings.jsonl").unlink()
    if content is not None:
        (tmp_path / "warnings.jsonl").write_text(content)
    with pytest.raises(ArtefactError, match=r"warnings\.jsonl has no lines or is missing.*stethoscope train") as error:
        _ = RunReader(tmp_path, source.store, source.results, results).task
    assert "\n" not in str(error.value)
