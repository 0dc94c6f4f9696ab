"""The configuration group ``features``: every set can be made, and is known by its cost."""

import subprocess
import sys

import pytest

from stethoscope.core.component import build, choices, compose
from stethoscope.core.errors import ConfigError
from stethoscope.features import FEATURES, GROUPS, FeatureSet, feature

NAMES = list(choices("features"))


def chosen(name):
    return build(compose([f"+features={name}"]).features, FeatureSet, "features")


@pytest.mark.parametrize("name", NAMES)
def test_every_set_can_be_made(name):
    features = chosen(name)
    assert features.cost.removeprefix("one ") in features.summary or "more forward passes" in features.summary
    if name.startswith("paper/"):
        assert not compose([f"+features={name}"]).features.groups


def test_costs_of_the_sets():
    assert chosen("fast").cost == "same forward pass"
    assert chosen("default").cost == "same forward pass"
    assert chosen("default_relevancy").cost == chosen("full").cost == "a backward pass"
    assert chosen("one_pass").cost == "same forward pass"
    assert chosen("full_verified").cost == "one more question per mention"
    assert chosen("everything").cost == "5 more answers"
    assert {item.group for item in chosen("everything").features} == set(GROUPS)
    dear = {"verification", "verify_states", "masked", "continuation", "sampling"}
    assert {item.group for item in chosen("full").features} == set(GROUPS) - dear
    assert {item.group for item in chosen("full_verified").features} == set(GROUPS) - dear | {"verification"}
    cheap = [item for item in chosen("full").features if item.cost == "same forward pass"]
    assert list(chosen("one_pass").features) == cheap


def test_several_sets_together():
    both = FeatureSet(groups=[], sets=["fast", "paper/svar"])
    assert set(both.names) == {*chosen("fast").names, *chosen("paper/svar").names}
    assert both.score is None
    assert "nll" not in FeatureSet(groups=[], sets=["fast", "paper/svar"], exclude=["nll"]).names


def test_a_wrong_word_in_a_feature_of_ones_own_names_the_feature():
    def mine(trace):
        """Return nothing."""

    with pytest.raises(ConfigError, match="feature mine: unknown part of a trace in requires 'atention'; did you mean"):
        feature("position", "grounded", requires=["atention"])(mine)
    with pytest.raises(ConfigError, match="feature mine: unknown higher_means 'good'"):
        feature("position", "good")(mine)
    assert "mine" not in FEATURES


def test_a_feature_of_ones_own_takes_no_name_of_another_and_explains_itself():
    def nll(trace):
        """Return zeros."""

    with pytest.raises(ConfigError, match=r"feature nll of .* needs another name: stethoscope.features.dist"):
        feature("mine", higher_means="depends")(nll)
    assert FEATURES["nll"].group == "uncertainty"
    with pytest.raises(ConfigError, match="has no docstring; its first line explains the feature in lists"):
        feature("mine", higher_means="depends")(lambda trace: None)


def test_list_tells_the_cost_of_every_set(capsys):
    from stethoscope.commands.list import main

    main(["features"])
    lines = capsys.readouterr().out.splitlines()
    for name in NAMES:
        start = next(index for index, line in enumerate(lines) if line.split()[:1] == [name])
        assert lines[start + 1].endswith(chosen(name).cost)


def test_the_experiment_of_all_detectors_is_large_enough_and_computes_all():
    config = compose(["experiment=detectors"], "benchmark")
    assert config.chair.scenes >= 2000
    assert config.published
    features = build(config.features, FeatureSet, "features")
    assert {item.group for item in features.features} == set(GROUPS)
    for name in config.sets:
        assert set(chosen(name).names) < set(features.names)


def test_a_file_in_the_package_is_enough_for_a_feature(tmp_path):
    (tmp_path / "digits.py").write_text(
        "from stethoscope.features.registry import feature\n\n\n"
        '@feature("digits", higher_means="depends")\ndef digit_count(trace):\n    """Number of digits."""\n'
    )
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('stethoscope.features')\n"
        "spec.submodule_search_locations.append(sys.argv[1])\n"  # as if the file lay in the package's folder
        "features = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(features)\n"
        "print(features.FEATURES['digit_count'].summary, features.GROUPS[-1])"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.stdout == "Number of digits. digits\n", done.stderr
