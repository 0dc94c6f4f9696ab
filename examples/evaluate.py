"""Run a benchmark on a model and read its metrics, each with a 95 % interval over images.

python examples/evaluate.py
"""

import stethoscope
from stethoscope.tasks.pope import Pope

adapter = stethoscope.load("testbed")  # or "llava-hf/llava-1.5-7b-hf", or a folder that `save_pretrained` wrote
task = Pope(scenes=15, subsets=["random", "adversarial"])

evaluator = stethoscope.Evaluator(batch_size=32, run_dir="runs/example-pope")
results = evaluator.run(adapter, task)  # the same call again continues an interrupted run

print(results)
print("adversarial F1:", results.interval("f1", "adversarial"))
