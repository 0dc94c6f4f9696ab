"""What a kill, a deleted file, a flipped bit or a second name of a file may do to a run directory."""

import os
import random

import pytest
from helpers.made_up_runs import made_up_run
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.detection.detector import Detector
from stethoscope.detection.lookup import write_warnings
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.report.run_source import RunReader
from stethoscope.storage.reuse import copy_task
from stethoscope.storage.run_dir import RunStore


def evaluate(folder, limit=6, **settings):
    return Evaluator(run_dir=folder, features=TinyFeatures(), limit=limit, **settings).run(TinyAdapter(), TinyTask(8))


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


COUNTS = ("samples", "ok", "unparsed", "failed", "truncated")


def test_answers_of_unknown_origin_are_adopted_by_nobody(tmp_path):
    run = tmp_path / "run"
    evaluate(run)
    (run / "fingerprint.json").unlink()
    before = (run / "samples.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"fingerprint\.json does not say"):
        evaluate(run)
    assert (run / "samples.jsonl").read_bytes() == before
    evaluate(run, overwrite=True)
    assert RunStore(run).status() == {"tiny": "finished"}


def test_the_fingerprint_of_another_task_is_none_of_these_answers(tmp_path):
    run = tmp_path / "run"
    evaluate(run)
    text = (run / "fingerprint.json").read_text()
    (run / "fingerprint.json").write_text(text.replace('"tiny": {', '"other": {', 1))
    with pytest.raises(ConfigError, match="holds answers to tiny"):
        evaluate(run)


def test_no_flipped_bit_of_the_token_table_goes_unseen(tmp_path):
    run = tmp_path / "run"
    evaluate(run)
    whole, data = RunStore(run).tokens(), (run / "tokens.parquet").read_bytes()
    draw, refused, messages = random.Random(0), 0, set()
    for _ in range(300):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        (run / "tokens.parquet").write_bytes(flipped)
        try:
            table = RunStore(run).tokens()
        except ArtefactError as error:
            messages.add(str(error))
            refused += 1
        else:
            assert table.equals(whole)  # a byte that means nothing
    assert refused > 200
    remedy = "; delete it and run `stethoscope extract` again"
    assert all("tokens.parquet is damaged" in text and text.endswith(remedy) for text in messages)


def test_other_readers_of_parquet_see_no_difference(tmp_path):
    import pandas as pd

    evaluate(tmp_path)
    assert len(pd.read_parquet(tmp_path / "tokens.parquet")) == len(RunStore(tmp_path).tokens()) > 0


def test_runs_that_share_a_table_append_to_files_of_their_own(tmp_path):
    one, two = made_up_run(tmp_path / "one"), tmp_path / "two"
    (one / "maps.jsonl").write_text('{"task": "chair", "sample_id": "0"}\n')
    copy_task(RunStore(one), two, "chair")
    assert (one / "tokens.parquet").samefile(two / "tokens.parquet")  # only ever replaced
    for name in ("maps.jsonl", "samples.jsonl"):
        assert not (one / name).samefile(two / name)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_copy_of_hard_links_is_a_run_of_its_own(tmp_path, overwrite):
    """As ``cp -al`` or a backup makes them, of a run that was killed in the middle of a line."""
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(one, 4)
    (one / "maps.jsonl").touch()
    with (one / "samples.jsonl").open("a") as file:
        file.write('{"half')
    two.mkdir()
    for path in one.iterdir():
        if path.is_file():
            os.link(path, two / path.name)
    before = {path.name: path.read_bytes() for path in one.iterdir() if path.suffix in (".jsonl", ".parquet", ".json")}
    evaluate(two, 8, overwrite=overwrite)
    assert RunStore(two).count("tiny") == 8
    assert {name: (one / name).read_bytes() for name in before} == before


def test_leftovers_of_a_kill_go_with_the_next_sitting(tmp_path):
    evaluate(tmp_path)
    (tmp_path / ".samples.jsonl.0123abcd.tmp").write_text("half")
    (tmp_path / ".detector.x.tmp").mkdir()
    evaluate(tmp_path, 8)
    assert not list(tmp_path.glob(".*.tmp"))


def test_warnings_are_finite(tmp_path):
    import pandas as pd

    row = {"sample_id": "s", "probability": float("nan"), "evidence": None, "prior": None, "visual_evidence": []}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_warnings(pd.DataFrame([row]), tmp_path / "warnings.jsonl")
    assert not os.listdir(tmp_path)
