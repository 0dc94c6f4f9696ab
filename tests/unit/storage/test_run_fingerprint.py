import json
from pathlib import Path

import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.core.digests import jsonable
from stethoscope.core.types import Generation
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
    assert len({digest(found) for found in [base, *others]}) == 7
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
    found = feature_fingerprint(TinyFeatures(), "mentions")
    assert found == {"names": ["position", "level"], "trace": "mentions"}
    assert found != feature_fingerprint(TinyFeatures(), "all")


def test_differences_name_missing_and_nested_keys():
    changes = differences({"a": {"b": 1, "c": [1]}, "gone": 0}, {"a": {"b": 2, "c": [1]}, "new": "x"})
    assert changes == [("a.b", 1, 2), ("gone", 0, None), ("new", None, "x")]
    assert describe(changes) == "a.b: 1 before, 2 now; gone: 0 before, None now; new: None before, 'x' now"
    assert describe([(str(number), 0, 1) for number in range(9)]).endswith("; and 3 more")
    assert len(describe([("text", "x" * 500, "")])) < 100


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (float("nan"), None),
        ({1: (2, 3)}, {"1": [2, 3]}),
        (Generation(max_new_tokens=3), {**jsonable(GREEDY), "max_new_tokens": 3}),
    ],
)
def test_jsonable(value, plain):
    assert jsonable(value) == plain


def test_environment_tells_versions_and_nothing_of_who_and_where():
    import getpass
    import socket

    found = json.dumps(environment())
    assert '"torch": "' in found
    assert socket.gethostname() not in found
    assert str(Path.home()) not in found
    assert getpass.getuser() not in found.replace("root", "") or getpass.getuser() == "root"
