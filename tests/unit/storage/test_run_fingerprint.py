import json
from pathlib import Path

import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Generation
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.run_fingerprint import (
    answer_fingerprint,
    describe,
    differences,
    digest,
    environment,
    feature_fingerprint,
)

GREEDY = Generation()


def test_what_changes_answers_changes_the_fingerprint():
    base = answer_fingerprint(TinyAdapter(), TinyTask(), GREEDY)

    class Newer(TinyTask):
        version = "2"

    others = [
        answer_fingerprint(TinyAdapter("2"), TinyTask(), GREEDY),
        answer_fingerprint(TinyAdapter(), TinyTask(count=3), GREEDY),
        answer_fingerprint(TinyAdapter(), Newer(), GREEDY),
        answer_fingerprint(TinyAdapter(), TinyTask(), Generation(max_new_tokens=9)),
        answer_fingerprint(TinyAdapter(), TinyTask(), Generation(num_beams=2)),
        answer_fingerprint(TinyAdapter(), TinyTask(), Generation(do_sample=True)),
    ]
    assert len({digest(fingerprint) for fingerprint in [base, *others]}) == 7
    assert digest(base) == digest(json.loads(json.dumps(base)))


def test_settings_of_sampling_count_only_while_sampling():
    greedy = [
        answer_fingerprint(TinyAdapter(), TinyTask(), Generation(seed=seed, top_p=0.5 + seed / 4)) for seed in (0, 1)
    ]
    drawn = [answer_fingerprint(TinyAdapter(), TinyTask(), Generation(do_sample=True, seed=seed)) for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    assert differences(*drawn) == [("generation.seed", 0, 1)]


def test_a_moved_folder_is_the_same_data():
    here, there = (TinyTask(broken={1: Path(root) / "val2014/1.png"}) for root in ("/home/a", "/mnt/b"))
    assert answer_fingerprint(TinyAdapter(), here, GREEDY) == answer_fingerprint(TinyAdapter(), there, GREEDY)


def test_features_are_told_apart_by_name_and_by_what_is_traced():
    fingerprint = feature_fingerprint(TinyFeatures(), "mentions")
    assert fingerprint == {"names": ["position", "level"], "trace": "mentions"}
    assert fingerprint != feature_fingerprint(TinyFeatures(), "all")


def test_differences_name_missing_and_nested_keys():
    changes = differences({"a": {"b": 1, "c": [1]}, "gone": 0}, {"a": {"b": 2, "c": [1]}, "new": "x"})
    assert changes == [("a.b", 1, 2), ("gone", 0, None), ("new", None, "x")]
    assert describe(changes) == "a.b: 1 before, 2 now; gone: 0 before, None now; new: None before, 'x' now"
    assert describe([(str(number), 0, 1) for number in range(9)]).endswith("; and 3 more")
    assert len(describe([("text", "x" * 500, "")])) < 100


def test_environment_tells_versions_and_nothing_of_who_and_where():
    import getpass
    import socket

    text = json.dumps(environment())
    assert '"torch": "' in text
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert getpass.getuser() not in text.replace("root", "") or getpass.getuser() == "root"


def evaluate(folder, limit=6, **settings):
    return Evaluator(run_dir=folder, features=TinyFeatures(), limit=limit, **settings).run(TinyAdapter(), TinyTask(8))


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
