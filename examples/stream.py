"""Warn during generation: print every token as it is generated, and the named objects at the end.

python examples/stream.py
"""

import stethoscope
from stethoscope import testbed
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair

QUESTION = "Please describe this image in detail."

adapter = stethoscope.load("testbed")
features = FeatureSet(groups=["uncertainty", "position", "attention", "lens"])  # can be computed during generation
stethoscope.Evaluator(batch_size=32, features=features, run_dir="runs/example-stream").run(adapter, Chair(scenes=80))
detector = stethoscope.Detector(C=0.1).fit(RunStore("runs/example-stream").tokens("chair"))

image = testbed.scenes(7)[6].image()
for item in stethoscope.stream(adapter, image, QUESTION, detector=detector):
    if hasattr(item, "warned"):  # a token
        print(item.text, end="", flush=True)
        continue
    print()  # the last item: the answer and the objects that it names
    for mention in item.mentions:
        print(f"{mention.verdict.probability:4.0%} {mention.object}{'  <- warned' if mention.warned else ''}")

encoded = adapter.encode(image, QUESTION)  # the same in a `generate` call of your own
with stethoscope.WarningStreamer(adapter, encoded, detector) as streamer:
    adapter.model.generate(**encoded.inputs, streamer=streamer, max_new_tokens=64, do_sample=False)
print(sum(token.warned for token in streamer.tokens), "tokens at or above the threshold")
