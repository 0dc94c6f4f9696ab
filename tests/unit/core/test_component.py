"""From a name to a model, in Python, whatever Hydra is doing meanwhile."""

import sys

import hydra
import pytest
from hydra import version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import stethoscope
from stethoscope.adapters.base import Adapter
from stethoscope.core.component import build, choices, compose, import_class, import_name, import_plugins
from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Generation
from stethoscope.detection.detector import Detector
from stethoscope.features import FeatureSet

SETTINGS = {"random_init": "tiny", "device": "cpu"}


@pytest.mark.parametrize("name", [name for name in choices("model") if name != "none"])
def test_every_configuration_loads_by_its_name(name):
    adapter = stethoscope.load(name, **SETTINGS)
    assert adapter.model.config.get_text_config().num_hidden_layers < 10
    if name != "hf":
        assert adapter.name == name


def test_defaults_are_followed_and_settings_win():
    config = compose(["+model=llava-1.5-7b"]).model
    assert config.model_id == "llava-hf/llava-1.5-7b-hf"
    assert "trust_remote_code" in config  # of hf.yaml
    adapter = stethoscope.load("llava-1.5-7b", name="mine", dtype="bfloat16", prompt="{image}{question}", **SETTINGS)
    assert (adapter.name, adapter.prompt, adapter.fingerprint()["dtype"]) == ("mine", "{image}{question}", "bfloat16")


def test_settings_that_are_mappings():
    adapter = stethoscope.load("hf", random_init="tiny", device_map="auto", max_memory={"cpu": "1GiB"})
    assert adapter.loading.max_memory == {"cpu": 2**30}
    adapter = stethoscope.load("hf", random_init="tiny", device_map={"": "cpu"})
    assert adapter.loading.device_map == {"": "cpu"}


def test_hydras_state_is_as_it_was():
    assert not GlobalHydra.instance().is_initialized()
    version.setbase("1.2")
    for _ in range(2):
        compose(["+model=testbed"])
        assert not GlobalHydra.instance().is_initialized()
        assert str(version.getbase()) == "1.2"


def test_inside_a_hydra_application(tmp_path):
    (tmp_path / "own.yaml").write_text("answer: 42\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        running = GlobalHydra.instance().hydra
        for _ in range(2):
            assert compose(["+model=llava-1.5-7b"]).model.name == "llava-1.5-7b"
            assert GlobalHydra.instance().hydra is running
            assert hydra.compose("own").answer == 42
            assert str(version.getbase()) == "1.2"


def test_hydras_state_survives_an_error(tmp_path):
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        running = GlobalHydra.instance().hydra
        with pytest.raises(hydra.errors.MissingConfigException):
            compose(["+model=nothing"])
        assert GlobalHydra.instance().hydra is running


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("lava-1.5-7b", {}, "unknown model 'lava-1.5-7b'; did you mean 'llava-1.5-7b'"),
        ("llava-1.5-7b", {"dtyp": "auto"}, "unknown model setting 'dtyp'; did you mean 'dtype'"),
        ("/no/such/folder", {}, "/no/such/folder"),
    ],
)
def test_wrong_names(model, settings, words):
    with pytest.raises(ConfigError, match=words):
        stethoscope.load(model, **settings)


def test_what_a_package_defines_and_what_it_has_imported():
    """Names that a package takes over from its own modules are its own too."""
    assert import_class("stethoscope.Detector", object, "detector").__module__ == "stethoscope.detection.detector"
    assert import_class("stethoscope.features.FeatureSet", FeatureSet, "features") is FeatureSet
    assert import_name("stethoscope.tasks.object_extraction.mentions", "mentions")("a dog")
    for path in (
        "stethoscope.core.component.importlib",
        "stethoscope.core.component.TARGET",
        "stethoscope.core.component.Path",
        "stethoscope",
    ):
        with pytest.raises(ConfigError, match=r"no class or function that|should be a dotted name"):
            import_name(path, "model._target_")


def test_nothing_outside_is_imported_to_be_refused(monkeypatch, tmp_path):
    (tmp_path / "never_imported.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"add plugins=\[never_imported\]"):
        build({"_target_": "never_imported.Model"}, Adapter, "model")
    assert "never_imported" not in sys.modules


@pytest.mark.parametrize("path", [None, 3, ["os.system"], {"a": 1}, "", ".", "a..b", "os.system ", "x" * 10**6 + ".y"])
def test_what_names_nothing_is_refused_in_a_short_line(path):
    with pytest.raises(ConfigError) as error:
        build({"_target_": path}, Adapter, "model")
    assert len(str(error.value)) < 300


def test_a_plugin_that_is_missing_is_named_beside_those_that_are_there():
    with pytest.raises(ConfigError, match=r"add plugins=\[json,csv\] if you trust it"):
        import_class("csv.DictReader", object, "model", ["json"])


def test_a_plugin_by_itself_or_in_a_list():
    assert build({"_target_": "collections.OrderedDict"}, dict, "model", "collections") == {}


def test_settings_that_the_constructor_refuses():
    with pytest.raises(ConfigError, match=r"generation: stethoscope.core.types.Generation cannot be made: .*no_such"):
        build({"_target_": "stethoscope.core.types.Generation", "no_such": 1}, Generation, "generation")
    with pytest.raises(ConfigError, match="is no Detector"):
        build({"_target_": "stethoscope.core.types.Generation"}, Detector, "detector")


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("tasks.chair.Chair", {"scenes": "two"}, "task.scenes='two' should be a whole number"),
        ("tasks.chair.Chair", {"scenes": True}, "task.scenes=True should be a whole number"),
        ("tasks.chair.Chair", {"drop_incomplete": "maybe"}, "task.drop_incomplete='maybe' should be true or false"),
        (
            "tasks.custom.Custom",
            {"images": "x", "question": "?", "max_new_tokens": 2.5},
            "task.max_new_tokens=2.5 should",
        ),
        ("evaluation.callbacks.Progress", {"every": "often"}, "task.every='often' should be a number"),
    ],
)
def test_a_setting_that_should_be_a_number_says_so(target, settings, message):
    with pytest.raises(ConfigError, match=message):
        build({"_target_": f"stethoscope.{target}", **settings}, object, "task")


def test_numbers_that_may_be_null_or_whole():
    node = {"_target_": "stethoscope.tasks.chair.Chair", "scenes": 2, "scene_seed": None, "image_ids": [3]}
    assert build(node, object, "task").scenes == 2
    assert build({"_target_": "stethoscope.evaluation.callbacks.Progress", "every": 3}, object, "task").every == 3


def test_an_argument_for_type_checkers_alone_leaves_the_others_checked(monkeypatch, tmp_path):
    (tmp_path / "half_readable.py").write_text(
        "from __future__ import annotations\n"
        "class Options:\n"
        "    def __init__(self, shape: Unknown = None, every: int | None = None): self.made = (shape, every)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    node = {"_target_": "half_readable.Options", "shape": "round"}
    assert build({**node, "every": 3}, object, "task", ["half_readable"]).made == ("round", 3)
    with pytest.raises(ConfigError, match=r"task.every='3' should be a whole number"):
        build({**node, "every": "3"}, object, "task", ["half_readable"])


def test_a_package_that_python_does_not_find_is_told_how_to_be_found(monkeypatch, tmp_path):
    for make in (
        lambda: import_plugins(["nowhere_to_be_found"]),
        lambda: import_name("nowhere_to_be_found.Model", "model._target_", ["nowhere_to_be_found"]),
    ):
        with pytest.raises(ConfigError, match="PYTHONPATH=FOLDER before the command names the folder that nowhere_to"):
            make()
    (tmp_path / "needs_more.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        import_plugins("needs_more")
    assert "PYTHONPATH" not in str(error.value)  # it was found; what it imports is another's


def test_classes_of_others_are_not_made_unless_trusted():
    config = OmegaConf.create({"_target_": "collections.OrderedDict"})
    with pytest.raises(ConfigError, match=r"plugins=\[collections\]"):
        build(config, dict, "model")
    assert build(config, dict, "model", plugins=["collections"]) == {}
