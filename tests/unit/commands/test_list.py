"""What ``stethoscope list`` prints: all groups, some of them, or what a name in a group stands for."""

import pytest

from stethoscope.commands.list import main
from stethoscope.core.component import choices, groups
from stethoscope.core.errors import ConfigError
from stethoscope.features import FEATURES


@pytest.fixture
def listed(capsys):
    def run(*words):
        main(words)
        return capsys.readouterr().out

    return run


def test_without_a_group_every_choice_and_no_single_feature(listed):
    lines = listed().splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [f"{group}=" for group in groups()]
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {*choices("model"), *choices("features")}
    assert not any(" nll " in line for line in lines)


def test_groups_one_after_another(listed):
    assert listed("task", "features") == listed("tasks") + listed("features")
    assert all(f" {name} " in listed("features") for name in FEATURES)


def test_a_choice_of_a_group(listed):
    lines = listed("model", "testbed").splitlines()
    assert len(lines) == 2
    assert lines[1].split()[0] == "testbed"


def test_a_single_feature_with_its_documentation(listed):
    text = listed("features", "svar")
    assert FEATURES["svar"].summary in text
    assert "15 % to 55 % of the depth" in text
    assert "Reads of a trace, beyond the logits: attention." in text
    assert "features=" not in text
    assert "attn_image " not in text


def test_a_group_of_features_and_a_named_set(listed):
    lines = listed("features", "position", "paper/nll").splitlines()
    assert lines[1].split()[0] == "paper/nll"
    shown = {line.split()[1] for line in lines if line.startswith("  position ")}
    assert shown == {name for name, item in FEATURES.items() if item.group == "position"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modl"], "group 'modl'; did you mean 'model'"),
        (["model", "testbet"], "choice of model 'testbet'; did you mean 'testbed'"),
        (["features", "sva"], "feature, group of features or choice of features 'sva'; did you mean 'svar'"),
    ],
)
def test_unknown_words(words, message):
    with pytest.raises(ConfigError, match=message):
        main(words)


def test_features_of_ones_own_package(listed, tmp_path, monkeypatch):
    (tmp_path / "listed_features.py").write_text(
        "from stethoscope.features import feature\n\n"
        "@feature('loudness', 'depends')\ndef shout(trace):\n    'Return how loud it is.'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for word in ("shout", "loudness"):
            assert " shout " in listed("features", word, "plugins=[listed_features]")
    finally:
        FEATURES.pop("shout", None)
