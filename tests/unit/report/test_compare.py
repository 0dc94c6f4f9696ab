"""Names of runs, and when two runs are comparable."""

import pytest
import yaml

from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Score
from stethoscope.report import compare
from stethoscope.report.run_source import RunReader
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair

COUNTS = {
    "mentions": 2.0,
    "hallucinated": 1.0,
    "captions": 1.0,
    "hallucinated_captions": 1.0,
    "truth": 2.0,
    "found": 1.0,
}


@pytest.fixture
def run_of(tmp_path):
    """Return a function that makes a finished run of some samples."""

    def make(name, samples=("a", "b"), overrides=(), failed=(), images="/one", parser="official"):
        folder = tmp_path / name
        store = RunStore(folder)
        settings = {"images": images, "parser": parser}
        task = {"class": "stethoscope.tasks.chair.Chair", "name": "chair", "version": "1", "settings": settings}
        store.open_task("chair", {"adapter": {"model_id": name}, "task": task})
        store.append([_record(sample, sample in failed) for sample in samples])
        store.finish("chair", list(samples))
        store.set_status("chair", "finished")
        store.write_metrics("chair", {"primary": "chair_i", "counts": {}, "metrics": []})
        (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
        return RunReader.read(folder)

    return make


def _record(sample, failed):
    score = None if failed else Score("ok", {**COUNTS, "words": 5.0 if sample == "a" else 7.0})
    return Record("chair", sample, sample, "all", "x.png", "What?", status="failed" if failed else "ok", score=score)


def test_swept_runs_are_called_by_what_differs(run_of):
    long = "x" * 40
    runs = [run_of(f"{long}-{seed}", overrides=["model=m", f"seed={seed}", f"name={seed}"]) for seed in (0, 1)]
    assert compare.run_names(runs) == ["seed=0", "seed=1"]
    assert compare.run_names([run_of("a"), run_of("b")]) == ["a", "b"]
    alike = [run_of(f"{long}-{name}", overrides=["model=m"]) for name in "cd"]
    assert compare.run_names(alike) == [f"{long}-c", f"{long}-d"]
    assert compare.run_names([run_of("q/a"), run_of("r/a")])[0].endswith("q/a")


def test_a_moved_folder_is_no_difference_but_another_parser_is(run_of):
    compare.require_same(run_of("a"), run_of("b", images="/two"))
    with pytest.raises(ConfigError, match=r"chair settings.parser is 'official' and 'strict'"):
        compare.require_same(run_of("c"), run_of("d", parser="strict"))


def test_samples_that_failed_in_one_run_count_in_neither(run_of):
    table = compare.paired_table(run_of("a", failed=["b"]), run_of("b"), Chair(), ("a", "b"))
    lengths = next(row for row in table.rows if row[0] == "length")
    assert lengths[2].value == lengths[3].value == 5
    assert "1 samples that failed in one of the runs are left out" in table.note


def test_samples_that_only_one_run_has(run_of):
    few, many = run_of("few", samples=("a",)), run_of("many", samples=("a", "b"), parser="strict")
    with pytest.raises(ConfigError, match=r"common=true compares the samples that both have"):
        compare.require_same(few, many)
    compare.require_same(few, many, common=True)
    table = compare.paired_table(few, many, Chair(), ("few", "many"))
    assert next(row for row in table.rows if row[0] == "length")[3].value == 5
    assert "1 samples that only one of the runs has are left out, 1 are common" in table.note


def test_what_differs_is_told(run_of):
    table = compare.setting_table([run_of("a"), run_of("b")], ("a", "b"))
    assert table.rows == (("adapter.model_id", "a", "b"),)


def test_runs_of_a_sweep_over_seeds_are_compared_within_a_seed(run_of):
    runs = [run_of(f"{way}{seed}", overrides=[f"generation={way}", f"seed={seed}"]) for seed in (0, 1) for way in "ab"]
    tables, remarks = compare.compare(runs, lambda run, name: Chair())
    assert [table.title for table in tables if " against " in table.title] == [
        "CHAIR: b0 against a0",
        "CHAIR: b1 against a1",
    ]
    assert any(remark.startswith("a1 has another seed than a0") for remark in remarks)
    tables, _ = compare.compare(runs[:3], lambda run, name: Chair())  # one run of a seed: as it was asked for
    assert [table.title for table in tables if " against " in table.title] == [
        "CHAIR: b0 against a0",
        "CHAIR: a1 against a0",
    ]
