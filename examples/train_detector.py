"""Train a detector on the objects that captions name, evaluate it on other images, and save it.

    python examples/train_detector.py

The commands `stethoscope evaluate`, `extract` and `train` do the same, and compare it with baselines and controls.
"""

import stethoscope
from stethoscope.features import FeatureSet
from stethoscope.metrics.bootstrap import split_folds
from stethoscope.metrics.classification import auroc, ece
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair

adapter = stethoscope.load("testbed")
features = FeatureSet(groups=["uncertainty", "position", "attention", "lens"])
stethoscope.Evaluator(batch_size=32, features=features, run_dir="runs/example-chair").run(adapter, Chair(scenes=120))

table = RunStore("runs/example-chair").tokens("chair")  # a row for every token of an answer that names an object
folds = split_folds(table["group"], (0.5, 0.2, 0.3), seed=0)
detector = stethoscope.Detector().fit(table[folds["train"]], table[folds["calibration"]])

test = detector.select_mentions(table[folds["test"]])  # a row for every object that is named for the first time
probability = detector.predict(test)
labels = test["label"].to_numpy(dtype=int)
print(f"{len(test)} mentions in {test['group'].nunique()} images, {labels.mean():.1%} hallucinated")
print(f"AUROC {auroc(labels, probability):.3f}, calibration error {ece(labels, probability):.3f}")

detector.save("runs/example-chair/detector")
assert (stethoscope.Detector.load("runs/example-chair/detector").predict(test) == probability).all()
