"""Estimators by class: scikit-learn's with settings, and one's own, whose file names a class but never imports it."""

import json
import sys

import numpy as np
import pytest
from helpers.token_tables import halves, token_table

from stethoscope import Detector
from stethoscope.core.component import build, import_plugins
from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection import artifact
from stethoscope.detection.base import Estimator
from stethoscope.detection.compiled_classifiers import SKLEARN
from stethoscope.metrics import classification

TRAIN, CALIBRATION = halves(token_table(400))
TEST = mention_rows(token_table(400, seed=9))
FOREST = "sklearn.ensemble.RandomForestClassifier"


class Halves(Estimator):
    """Judges by which side of the mean the first column lies on, with far too sure probabilities."""

    def __init__(self, sure: float = 0.999, names: list | None = None) -> None:
        self.sure, self.names = sure, names

    def fit(self, X, y):
        self.sign_ = 1.0 if X[y == 1, 0].mean() > 0 else -1.0
        return self

    def predict_proba(self, X):
        share = np.where(self.sign_ * X[:, 0] > 0, self.sure, 1 - self.sure)
        return np.column_stack([1 - share, share])

    def to_arrays(self):
        return {"sign": np.array(self.sign_)}

    def from_arrays(self, arrays):
        self.sign_ = float(arrays["sign"])


PATH = f"{__name__}.Halves"


@pytest.mark.parametrize("settings", [{}, {"objects": True}, {"calibration": "isotonic"}, {"calibration": "none"}])
def test_an_estimator_of_ones_own_comes_back_from_disk_as_it_was(tmp_path, settings):
    detector = Detector({"_target_": PATH, "sure": 0.99}, features=["nll"], **settings).fit(TRAIN, CALIBRATION)
    detector.save(tmp_path / "detector")
    again = Detector.load(tmp_path / "detector")
    assert (again.predict(TEST) == detector.predict(TEST)).all()
    assert again.settings["estimator"] == {"_target_": PATH, "sure": 0.99}
    assert again.manifest == detector.manifest
    assert "Halves" in (tmp_path / "detector" / "README.md").read_text()


def test_its_probabilities_are_calibrated_like_all_others():
    """It says .999 and .001; what comes out is how often it is right on the calibration images."""
    detector = Detector(PATH, features=["nll"]).fit(TRAIN, CALIBRATION)
    own = detector.model.scores(TEST[["nll"]].to_numpy(dtype=float))
    assert np.unique(np.abs(own)).round(6).tolist() == [round(float(np.log(0.999 / 0.001)), 6)]
    rows = mention_rows(CALIBRATION)
    above = detector.model.scores(rows[["nll"]].to_numpy(dtype=float)) > 0
    shares = [rows["label"][above == side].mean() for side in (False, True)]
    assert np.unique(detector.predict(TEST)) == pytest.approx(shares, abs=1e-4)
    assert classification.ece(TEST["label"].to_numpy(), detector.predict(TEST)) < 0.06


def test_objects_stand_for_their_class_and_settings():
    from sklearn.ensemble import RandomForestClassifier

    assert Detector(Halves(sure=0.9)).settings["estimator"] == {"_target_": PATH, "sure": 0.9}
    forest = Detector(RandomForestClassifier(n_estimators=20, max_depth=4)).settings["estimator"]
    assert forest == {"_target_": FOREST, "n_estimators": 20, "max_depth": 4}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module with an estimator, on the path and not imported; importing it leaves a mark."""
    text = (
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from stethoscope.detection.base import Estimator\n"
        "Path('imported').touch()\n"
        "class Constant(Estimator):\n"
        "    def fit(self, X, y): self.share_ = float(y.mean()); return self\n"
        "    def predict_proba(self, X): return np.full((len(X), 2), [1 - self.share_, self.share_])\n"
        "    def to_arrays(self): return {'share': np.array(self.share_)}\n"
        "    def from_arrays(self, arrays): self.share_ = float(arrays['share'])\n"
        "class Other: pass\n"
    )
    (tmp_path / "own_estimators.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield "own_estimators.Constant"
    sys.modules.pop("own_estimators", None)


def node(estimator):
    return {"_target_": "stethoscope.detection.detector.Detector", "estimator": estimator}


@pytest.mark.parametrize("mapping", [True, False])
def test_the_class_is_imported_by_plugins_alone(plugin, tmp_path, mapping):
    config = node({"_target_": plugin} if mapping else plugin)
    with pytest.raises(ConfigError, match=r"no imported subclass of .*add plugins=\[own_estimators\] if you trust it"):
        build(config, Detector, "detector")
    assert not (tmp_path / "imported").exists()
    assert build(config, Detector, "detector", ["own_estimators"]).settings["estimator"] == config["estimator"]
    assert (tmp_path / "imported").exists()


def rename(folder, estimator):
    """Let a saved detector name another estimator."""
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    manifest["settings"]["estimator"] = estimator
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))


def test_a_file_imports_nothing(plugin, tmp_path):
    """Not the class that it names, although it could be imported; what it may say is how to import it."""
    Detector("sklearn.linear_model.RidgeClassifier").fit(TRAIN, CALIBRATION).save(tmp_path / "hostile")
    for estimator in (plugin, {"_target_": plugin}):
        rename(tmp_path / "hostile", estimator)
        with pytest.raises(
            ArtefactError, match=r"own_estimators.Constant, which is not imported; add plugins=\[own_est"
        ):
            Detector.load(tmp_path / "hostile")
    assert not (tmp_path / "imported").exists()
    import_plugins(["own_estimators"])
    with pytest.raises(ArtefactError, match="Constant refuses its arrays: KeyError: 'share'"):
        Detector.load(tmp_path / "hostile")


@pytest.mark.parametrize(
    "estimator",
    [
        "os.system",
        "sklearn.pipeline.Pipeline",
        "stethoscope.detection.base.Estimator",
        {"_target_": "subprocess.Popen", "args": "touch pwned"},
        {"_target_": f"{__name__}.np.load"},
        {"_target_": "a b; c"},
        {"_target_": "x" * 5000},
        {"_target_": 3},
        {"_target_": FOREST, "criterion": {"_target_": "os.getcwd"}, "nothing": 1},
        ["logistic"],
        None,
    ],
    ids=lambda estimator: str(estimator)[:40],
)
def test_a_hostile_name_is_refused_in_one_line(tmp_path, estimator):
    Detector("sklearn.tree.DecisionTreeClassifier").fit(TRAIN, CALIBRATION).save(tmp_path / "hostile")
    rename(tmp_path / "hostile", estimator)
    with pytest.raises(ArtefactError) as error:
        Detector.load(tmp_path / "hostile")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_loading_never_fits(tmp_path, monkeypatch):
    Detector(PATH, features=["nll"]).fit(TRAIN, CALIBRATION).save(tmp_path / "detector")
    rename(tmp_path / "detector", {"_target_": PATH, "sure": 0.8})  # not tried before
    monkeypatch.delattr(Halves, "fit")
    assert Detector.load(tmp_path / "detector").settings["estimator"]["sure"] == 0.8


class Wrong(Halves):
    """Breaks the contract in the way that its argument says."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way = way

    def fit(self, X, y):
        if self.way == "fit":
            raise RuntimeError("no licence\nsee the log")
        return super().fit(X, y)

    def predict_proba(self, X):
        probabilities = super().predict_proba(X)
        return {"one column": probabilities[:, 1], "odds": probabilities * 9}.get(self.way, probabilities)

    def to_arrays(self):
        arrays = {
            "a list": [1.0],
            "objects": {"sign": np.array([{}])},
            "gaps": {"sign": np.array(np.nan)},
            "names": {"a.b": np.zeros(1)},
            "lost": {"sign": np.array(-self.sign_)},
        }
        return arrays.get(self.way, super().to_arrays())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("fit", "cannot be used: RuntimeError: no licence$"),
        ("one column", "predict_proba should return 40 x 2 probabilities from 0 to 1, got 40 of type float64"),
        ("odds", "got 40 x 2 of type float64, some of them outside"),
        ("a list", "to_arrays should return arrays by name"),
        ("objects", "'sign' should be an array of float64, float32, int64, bool or uint8, got object"),
        ("gaps", "'sign' holds numbers that are not finite"),
        ("names", "to_arrays should return arrays by name"),
        ("lost", r"gives other probabilities after from_arrays\(to_arrays\(\)\) than before"),
    ],
)
def test_a_class_that_breaks_the_contract_is_named_at_once(way, message):
    with pytest.raises(ConfigError, match=message):
        Detector({"_target_": f"{__name__}.Wrong", "way": way})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "sklearn.naive_bayes.GaussianNB"}, "There are: boosting, logistic, per_head, sklearn.disc"),
        ({"estimator": "sklearn.svm.SVM"}, "did you mean 'sklearn.svm.SVC'"),
        ({"estimator": "xgboost.XGBClassifier"}, r"no imported subclass of .*; add plugins=\[xgboost\]"),
        ({"estimator": {"_target_": PATH, "surely": 1}}, "unknown setting of detector.estimator 'surely'"),
        ({"estimator": Halves(names=[np.zeros(1)])}, "cannot be written as JSON"),
        ({"estimator": PATH, "factored": True}, "weighs mentions, but .*Halves.fit takes no sample_weight"),
        ({"estimator": {"_target_": "logistic"}}, "should be one of logistic"),
        ({"estimator": {"_target_": "sklearn.svm.SVC", "kernel": "precomputed"}}, "sklearn.svm.SVC refuses"),
        ({"estimator": {"_target_": "sklearn.svm.SVC", "kernel": "poly", "degree": 12}}, "of degree 8 at most"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Detector(**settings)


@pytest.mark.slow  # test_compiled_classifiers has each class by itself
def test_every_class_can_be_a_detector(tmp_path):
    for name in SKLEARN:
        detector = Detector(name).fit(TRAIN, CALIBRATION)
        detector.save(tmp_path / "detector")
        probabilities = Detector.load(tmp_path / "detector").predict(TEST)
        assert (probabilities == detector.predict(TEST)).all()
        assert classification.auroc(TEST["label"].to_numpy(), probabilities) > (0.6 if ".tree." in name else 0.7), name
