import importlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers.made_up_runs import made_up_run
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask
from omegaconf import OmegaConf

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.token_table import KEY_COLUMNS
from stethoscope.core.types import Answer, Mention, Score
from stethoscope.evaluation.cost_meter import CostMeter
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features.registry import TokenColumns
from stethoscope.loggers.file_loggers import CsvLogger
from stethoscope.storage import tokens as tokens_module
from stethoscope.storage.records import Record
from stethoscope.storage.reuse import copy_task
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.tokens import SCHEMA, TokenRows, token_tables, unpacked

SAMPLES = TinyTask(count=6).samples()
ANSWER = Answer("a hot dog", (7, 8, 9), ((0, 1), (1, 5), (5, 9)), (-0.5, -1.25, -2.0))
MENTIONS = (Mention(2, 9, "hot dog", 1, 0, 0),)
MODEL = {"adapter": {"revision": 1}, "task": {"version": "1"}}


def record(number, **other):
    sample = SAMPLES[number]
    settings = {
        **{"task": "tiny", "sample_id": sample.id, "group": sample.group, "subset": sample.subset},
        **{"image": sample.image.name, "question": sample.question, "reference": sample.reference},
        **{"answer": ANSWER, "score": Score("ok", {"right": 1.0}, {"named": ["hot dog"]}), "mentions": MENTIONS},
        "seconds": {"generate": 0.1234567},
    }
    return Record(**{**settings, **other})


def rows(number, value=0.0, **other):
    features = TokenColumns.of({"level": np.full(3, value), **other})
    return token_tables("tiny", [TokenRows(SAMPLES[number], ANSWER, ANSWER.owners(MENTIONS), features)])[0]


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path / "run")
    store.open_task("tiny", MODEL)
    return store


def test_records_come_back_as_they_went_in(store):
    failed = record(1, status="failed", error="broken", answer=None, score=None, mentions=())
    odd = record(2, question="née \u2028 \ud800?", status="unparsed", score=Score("unparsed", {}, {}))
    store.append([record(0), failed, odd])
    back = list(RunStore(store.run_dir).records("tiny"))
    assert back[0] == record(0, seconds={"generate": 0.123457})
    assert back[1].answer is None
    assert (back[2].question, back[2].score) == (odd.question, odd.score)
    assert back[0].changes(SAMPLES[0]) == []
    assert back[0].changes(SAMPLES[1])
    assert store.samples_file.read_bytes().count(b"\n") == 3


def test_the_token_table_has_the_key_columns_in_order_and_labels_of_the_covering_mention():
    table = unpacked(rows(0, 0.5))
    assert table.column_names == [*KEY_COLUMNS, "level"]
    assert SCHEMA.names == list(KEY_COLUMNS)
    frame = table.to_pandas()
    assert frame["text"].tolist() == ["a", " hot", " dog"]
    assert frame["label"].tolist() == [-1, 1, 1]
    assert frame["is_first_subtoken"].tolist() == [False, True, False]
    assert frame["object"].tolist() == ["", "hot dog", "hot dog"]
    assert frame["mention_index"].tolist() == [-1, 0, 0]
    assert frame["level"].dtype == np.float32


def test_image_tokens_are_stored_once_and_come_back_in_all_rows_of_an_answer(store):
    level = TokenColumns.of({"level": np.zeros(3)})
    for number, tokens in enumerate(("2 AAAAAAAA", "")):
        item = TokenRows(SAMPLES[number], ANSWER, ANSWER.owners(MENTIONS), level, "", "", tokens)
        [table] = token_tables("tiny", [item])
        assert unpacked(table)["image_tokens"].to_pylist() == [tokens, "", ""]
        store.append([record(number)], {SAMPLES[number].id: table})
    for _ in range(2):
        frame = store.tokens("tiny")
        assert frame["image_tokens"].tolist() == ["2 AAAAAAAA"] * 3 + [""] * 3
        assert frame["image_tokens"].iloc[0] is frame["image_tokens"].iloc[2]  # no copy for every token
        store.finish("tiny", [sample.id for sample in SAMPLES])


def test_the_last_line_of_a_sample_counts_and_its_rows_with_it(store):
    store.append([record(0), record(1)], {"s00": rows(0, 1.0), "s01": rows(1, 1.0)})
    store.append([record(0)], {"s00": rows(0, 2.0)})
    assert [item.sample_id for item in store.records()] == ["s01", "s00"]
    assert store.tokens().groupby("sample_id")["level"].first().to_dict() == {"s00": 2.0, "s01": 1.0}
    store.finish("tiny", ["s00", "s01"])
    assert [item.sample_id for item in store.records()] == ["s00", "s01"]
    merged = pd.read_parquet(store.run_dir / "tokens.parquet")
    assert merged["sample_id"].tolist() == ["s00"] * 3 + ["s01"] * 3
    assert merged.equals(store.tokens())
    assert not (store.run_dir / "tokens").exists()
    assert len(store.samples_file.read_text().splitlines()) == 2


def test_rows_are_merged_in_the_order_of_the_samples_whatever_the_parts(store, monkeypatch):
    monkeypatch.setattr(tokens_module, "ROWS_AT_ONCE", 7)
    for number in (4, 1, 5, 0):
        store.append([record(number)], {f"s{number:02d}": rows(number, number)})
    store.finish("tiny", [sample.id for sample in SAMPLES])
    store.open_task("tiny", MODEL)
    store.append([record(2), record(3)], {"s03": rows(3, 3, other=np.ones(3))})
    store.finish("tiny", [sample.id for sample in SAMPLES])
    frame = pd.read_parquet(store.run_dir / "tokens.parquet")
    assert frame["level"].tolist() == [number for number in (0, 1, 3, 4, 5) for _ in range(3)]
    assert frame["other"].isna().sum() == 12
    assert store.find("tiny", "s02").tokens == 0


def test_packed_rows_of_one_width_keep_their_names(store):
    """Rows of as many features, but others, come back under their own names, beside rows with a column each."""
    named = [rows(0, 1, a=np.ones(3)), rows(1, 2, b=np.arange(3)), unpacked(rows(2, 3, a=np.zeros(3)))]
    store.append([record(number) for number in range(3)], {f"s0{number}": table for number, table in enumerate(named)})
    store.append([record(3)], {"s03": rows(3, 4, a=np.full(3, 7))})
    store.append([record(4)], {"s04": rows(4, 5, b=np.full(3, 8))})
    for table in (store.tokens(), (store.finish("tiny", [sample.id for sample in SAMPLES]), store.tokens())[1]):
        assert table["level"].tolist() == [number for number in range(1, 6) for _ in range(3)]
        np.testing.assert_array_equal(table["a"], [1, 1, 1, *[np.nan] * 3, 0, 0, 0, 7, 7, 7, *[np.nan] * 3])
        np.testing.assert_array_equal(table["b"], [*[np.nan] * 3, 0, 1, 2, *[np.nan] * 6, 8, 8, 8])


@pytest.mark.parametrize("rest", ['{"task": "tiny", "sam', '{"task": "tiny"}\n', "\x00\x00\n{", '["tiny"]'])
def test_what_a_kill_leaves_behind_is_dropped(store, rest):
    store.append([record(0)], {"s00": rows(0)})
    size = store.samples_file.stat().st_size
    with store.samples_file.open("a") as file:
        file.write(rest)
    (store.run_dir / "tokens/part-000001.arrow").write_bytes(b"half")
    again = RunStore(store.run_dir)
    assert len(list(again.records())) == 1
    again.open_task("tiny", MODEL)
    assert store.samples_file.stat().st_size == size
    assert [path.name for path in (store.run_dir / "tokens").iterdir()] == ["part-000000.arrow"]


@pytest.mark.parametrize("cut", [1, 100, 700])
def test_a_part_that_a_kill_cut_off_keeps_the_rows_before(store, cut):
    store.append([record(0)], {"s00": rows(0, 5)})
    store.append([record(1)], {"s01": rows(1, 6)})
    part = store.run_dir / "tokens/part-000000.arrow"
    part.write_bytes(part.read_bytes()[:-cut])
    again = RunStore(store.run_dir)
    again.open_task("tiny", MODEL)
    assert again.tokens()["level"].tolist() == [5, 5, 5]
    assert [again.has_tokens(item) for item in again.records()] == [True, False]
    again.append([record(1)], {"s01": rows(1, 7)})
    again.finish("tiny", ["s00", "s01"])
    assert pd.read_parquet(store.run_dir / "tokens.parquet")["level"].tolist() == [5, 5, 5, 7, 7, 7]


def test_a_part_whose_offsets_point_beyond_it_is_cut_off_there(store):
    store.append([record(0)], {"s00": rows(0, 5)})
    store.record_files.repair()
    part = store.run_dir / "tokens/part-000000.arrow"
    with pa.ipc.open_stream(part.read_bytes()) as reader:
        table = reader.read_all()
    offsets = pa.py_buffer(np.array([0, 10**9, 2, 3], np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc")])
    broken = table.set_column(table.schema.get_field_index("text"), "text", texts)
    with pa.ipc.new_stream(str(part), broken.schema) as writer:
        writer.write_table(broken)
    again = RunStore(store.run_dir)
    assert not again.has_tokens(again.find("tiny", "s00"))
    assert len(again.tokens()) == 0


def test_a_kill_between_the_steps_of_finishing_doubles_nothing(store, monkeypatch):
    store.append([record(0), record(1)], {"s00": rows(0), "s01": rows(1)})
    monkeypatch.setattr("stethoscope.storage.records.encode_line", lambda values: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        store.finish("tiny", ["s00", "s01"])  # tokens.parquet is written, samples.jsonl is not
    monkeypatch.undo()
    assert (store.run_dir / "tokens.parquet").exists()
    again = RunStore(store.run_dir)
    assert len(again.tokens()) == 6
    again.open_task("tiny", MODEL)
    again.finish("tiny", ["s00", "s01"])
    assert len(again.tokens()) == len(pd.read_parquet(store.run_dir / "tokens.parquet")) == 6


def test_rows_that_are_gone_are_missing_rows(store):
    store.append([record(0)], {"s00": rows(0)})
    assert store.has_tokens(store.find("tiny", "s00"))
    (store.run_dir / "tokens/part-000000.arrow").unlink()
    again = RunStore(store.run_dir)
    assert not again.has_tokens(again.find("tiny", "s00"))
    assert len(again.tokens()) == 0


def test_a_damaged_line_in_the_middle_is_named(store):
    store.append([record(0)])
    with store.samples_file.open("a") as file:
        file.write("what is this\n")
    with store.samples_file.open("ab") as file:
        file.write(store.samples_file.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ArtefactError, match=r"samples\.jsonl:2 is damaged"):
        list(RunStore(store.run_dir).records())


def test_other_settings_are_refused_and_leave_everything_as_it_was(store):
    store.append([record(0)], {"s00": rows(0)})
    store.open_task("tiny", MODEL, {"names": ["level"]})
    before = {path: path.read_bytes() for path in store.run_dir.rglob("*") if path.is_file()}
    other = {**MODEL, "adapter": {"revision": 2}}
    with pytest.raises(
        ConfigError, match=r"holds a run of tiny with other settings \(adapter\.revision: 1 before, 2 now"
    ):
        store.open_task("tiny", other)
    with pytest.raises(ConfigError, match=r"adapter\.revision"):
        store.open_task("another", other)
    with pytest.raises(ConfigError, match=r"features\.names"):
        store.open_task("tiny", MODEL, {"names": ["entropy"]})
    assert before == {path: path.read_bytes() for path in store.run_dir.rglob("*") if path.is_file()}
    store.open_task("another", other, overwrite=True)
    assert list(store.fingerprints()) == ["another"]
    assert store.samples_file.read_bytes() == b""
    assert len(store.tokens()) == 0
    assert not (store.run_dir / "tokens").exists()


def test_metrics_are_merged_by_section(store):
    store.write_metrics("tiny", {"value": 0.5, "missing": float("nan")})
    store.write_metrics("detector", {"auroc": np.float64(0.9)})
    assert json.loads((store.run_dir / "metrics.json").read_text()) == {
        "tiny": {"value": 0.5, "missing": None},
        "detector": {"auroc": 0.9},
    }
    store.open_task("tiny", MODEL)
    assert list(store.metrics()) == ["detector"]


def test_config_is_written_without_secrets(store):
    store.write_config(OmegaConf.create({"a": 1, "b": "${a}", "hub_token": "hf_x"}), ["a=1"])
    assert (store.run_dir / "config.yaml").read_text() == "a: 1\nb: 1\nhub_token: '***'\n"
    assert (store.run_dir / "overrides.yaml").read_text() == "- a=1\n"
    assert "packages" in json.loads((store.run_dir / "environment.json").read_text())


def test_a_run_that_is_not_there_is_named_with_its_neighbours(store):
    with pytest.raises(ArtefactError, match=r"unknown run 'rum'; did you mean 'run'\?"):
        list(RunStore(store.run_dir.parent / "rum").records())
    with pytest.raises(ArtefactError, match="unknown task 'pope'"):
        list(store.records("pope"))
    (store.run_dir / "metrics.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"metrics\.json is damaged"):
        store.metrics()


def test_rows_say_what_the_model_was_asked_and_who_labelled():
    own = TokenRows(SAMPLES[0], ANSWER, ANSWER.owners(MENTIONS), TokenColumns.of({}), "USER: what? ASSISTANT:")
    table = own.frame("tiny", version="3")
    assert table["labeller"].unique().tolist() == ["tiny/3"]
    assert table["prompt_hash"].unique().tolist() == ["01a8723f63495759"]
    other = own._replace(prompt="USER: what else?").frame("tiny", version="3")
    assert other["prompt_hash"][0] != table["prompt_hash"][0]


def test_token_rows_of_a_run_from_before_are_read_and_added_to(store):
    """Older token tables lack the last two key columns: they stay empty, and are no features."""
    store.append([record(0)], {SAMPLES[0].id: unpacked(rows(0, 0.5)).drop_columns(["prompt_hash", "labeller"])})
    store.finish("tiny", [SAMPLES[0].id])
    assert "labeller" in store.tokens().columns
    store.append([record(1)], {SAMPLES[1].id: rows(1, 0.7)})
    store.finish("tiny", [SAMPLES[0].id, SAMPLES[1].id])
    table = RunStore(store.run_dir).tokens("tiny")
    assert table["labeller"].isna().tolist() == [True] * 3 + [False] * 3
    assert table["level"].tolist() == pytest.approx([0.5] * 3 + [0.7] * 3)
    assert set(table.columns) == {*KEY_COLUMNS, "level"}


# --- several processes ----------------------------------------------------------------------------------------------


def writers(store, count):
    """Stores of several processes on a run directory that the first one has opened."""
    stores = [RunStore(store.run_dir) for _ in range(count)]
    for rank, process_store in enumerate(stores):
        process_store.use_shard(rank)
    return stores


def test_each_process_writes_files_of_its_own_and_readers_see_all(store):
    store.append([record(0)], {"s00": rows(0, 9.0)})  # of an earlier session
    first, second = writers(store, 2)
    first.append([record(1)], {"s01": rows(1, 1.0)})
    second.append([record(2)], {"s02": rows(2, 2.0)})
    second.append([record(0)], {"s00": rows(0, 3.0)})  # asked again
    reader = RunStore(store.run_dir)
    assert {item.sample_id for item in reader.records()} == {"s00", "s01", "s02"}
    assert reader.tokens().groupby("sample_id")["level"].first().to_dict() == {"s00": 3.0, "s01": 1.0, "s02": 2.0}
    assert first.find("tiny", "s02") is None  # a process knows what was there and its own
    assert second.find("tiny", "s00").part.startswith("part-r1-")
    other = store.record_files.shards / ".nfs0001"  # a file of somebody else
    other.touch()
    for _ in range(2):
        first.finish("tiny", ["s00", "s01", "s02"])
        assert [item.sample_id for item in reader.records()] == ["s00", "s01", "s02"]
        assert pd.read_parquet(store.run_dir / "tokens.parquet")["level"].tolist() == [3.0] * 3 + [1.0] * 3 + [2.0] * 3
        other.unlink(missing_ok=True)
    assert sorted(path.name for path in store.run_dir.iterdir() if path.is_dir()) == []
    assert len(store.samples_file.read_text().splitlines()) == 3


@pytest.mark.parametrize("kill_at", range(12))
def test_a_kill_while_the_files_of_processes_are_put_together_loses_and_doubles_nothing(store, monkeypatch, kill_at):
    """Each step that changes the directory is the last in turn; the next session ends as if there had been no kill."""
    for number, process_store in enumerate(writers(store, 2)):
        process_store.append([record(number)], {f"s{number:02d}": rows(number, number)})
    with (store.record_files.shards / "samples-1.jsonl").open("a") as file:
        file.write('{"task": "tiny", "sam')
    calls = []

    def killing(function):
        def step(*arguments, **settings):
            calls.append(function)
            if len(calls) > kill_at:
                raise SystemExit
            return function(*arguments, **settings)

        return step

    with monkeypatch.context() as patched:
        for module_name, name in (("os", "truncate"), ("os", "replace"), ("shutil", "copyfileobj")):
            module = importlib.import_module(module_name)
            patched.setattr(module, name, killing(getattr(module, name)))
        for name in ("unlink", "rmdir"):
            patched.setattr(Path, name, killing(getattr(Path, name)))
        with pytest.raises(SystemExit):
            RunStore(store.run_dir).finish("tiny", ["s00", "s01"])
    again = RunStore(store.run_dir)
    again.open_task("tiny", MODEL)
    assert sorted(item.sample_id for item in again.records()) == ["s00", "s01"]
    assert all(again.has_tokens(item) for item in again.records())
    again.finish("tiny", ["s00", "s01"])
    assert pd.read_parquet(store.run_dir / "tokens.parquet")["level"].tolist() == [0] * 3 + [1] * 3
    assert len(store.samples_file.read_text().splitlines()) == 2
    assert not store.record_files.shards.exists()
    assert not (store.run_dir / "tokens").exists()


# --- changed code and features --------------------------------------------------------------------------------------


def test_other_code_and_other_settings_of_the_model_are_refused(store):
    fingerprint = {
        "adapter": {"revision": 1, "code": "a1", "settings": {"config": "c1"}},
        "task": {"version": "1", "code": "b1"},
    }
    store.open_task("tiny", fingerprint, overwrite=True)
    with pytest.raises(ConfigError, match=r"task\.code: 'b1' before, 'b2' now"):
        store.open_task("tiny", {**fingerprint, "task": {"version": "1", "code": "b2"}})
    with pytest.raises(ConfigError, match=r"adapter\.settings\.config: 'c1' before, 'c2' now"):
        store.open_task("tiny", {**fingerprint, "adapter": {**fingerprint["adapter"], "settings": {"config": "c2"}}})


def test_features_may_be_added_with_newer_code_and_the_answers_keep_their_own(store):
    old, new = ({"adapter": {"code": code}, "task": {"code": code}} for code in "ab")
    store.open_task("tiny", {**MODEL, **old}, overwrite=True)
    store.append([record(0)])
    store.open_task("tiny", {**MODEL, **new}, {"names": ["level"]}, overwrite="features")
    assert store.fingerprints()["tiny"]["task"]["code"] == "a"
    assert len(list(store.records())) == 1
    with pytest.raises(ConfigError, match=r"adapter\.code: 'a' before, 'b' now"):
        store.open_task("tiny", {**MODEL, **new})


@pytest.mark.parametrize("section", ["text", {"adapter": "text"}, {"adapter": MODEL["adapter"], "task": [1]}])
def test_a_fingerprint_of_another_kind_is_damaged(tmp_path, section):
    (tmp_path / "fingerprint.json").write_text(json.dumps({"tiny": section}))
    with pytest.raises(ArtefactError, match=r"fingerprint\.json is damaged"):
        RunStore(tmp_path).model("tiny")


def evaluate(folder, limit=6, **settings):
    return Evaluator(run_dir=folder, features=TinyFeatures(), limit=limit, **settings).run(TinyAdapter(), TinyTask(8))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_copy_of_hard_links_is_a_run_of_its_own(tmp_path, overwrite):
    """As ``cp -al`` or a backup makes them, of a run that was killed in the middle of a line."""
    first, copy = tmp_path / "one", tmp_path / "two"
    settings = {"callbacks": [CostMeter()], "loggers": [CsvLogger(".")]}
    evaluate(first, 4, **settings)
    (first / "maps.jsonl").touch()
    with (first / "samples.jsonl").open("a") as file:
        file.write('{"half')
    copy.mkdir()
    for p in first.iterdir():
        if p.is_file():
            os.link(p, copy / p.name)
    before = {p.name: p.read_bytes() for p in first.iterdir() if p.suffix in (".jsonl", ".parquet", ".json", ".csv")}
    assert {"costs.jsonl", "metrics.csv", "settings.csv"} <= before.keys()
    evaluate(copy, 8, overwrite=overwrite, **settings)
    assert RunStore(copy).count("tiny") == 8
    assert {name: (first / name).read_bytes() for name in before} == before


def test_leftovers_of_a_kill_go_with_the_next_sitting(tmp_path):
    evaluate(tmp_path)
    (tmp_path / ".samples.jsonl.0123abcd.tmp").write_text("half")
    (tmp_path / ".detector.x.tmp").mkdir()
    evaluate(tmp_path, 8)
    assert not list(tmp_path.glob(".*.tmp"))


def test_runs_that_share_a_table_append_to_files_of_their_own(tmp_path):
    source, copy = made_up_run(tmp_path / "one"), tmp_path / "two"
    (source / "maps.jsonl").write_text('{"task": "chair", "sample_id": "0"}\n')
    copy_task(RunStore(source), copy, "chair")
    assert (source / "tokens.parquet").samefile(copy / "tokens.parquet")  # only ever replaced
    for name in ("maps.jsonl", "samples.jsonl"):
        assert not (source / name).samefile(copy / name)
