"""Warn during generation: print tokens as they are generated, and a warning as soon as an object is named.

python examples/stream.py
"""

import stethoscope
from stethoscope import testbed
from stethoscope.core.types import Generation
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import RunStore
from stethoscope.streaming import Final, MentionCompleted, Token
from stethoscope.tasks.chair import Chair

QUESTION = "Please describe this image in detail."

adapter = stethoscope.load("testbed")
features = FeatureSet(groups=["uncertainty", "position", "attention", "lens"])  # can be computed during generation
stethoscope.Evaluator(batch_size=32, features=features, run_dir="runs/example-stream").run(adapter, Chair(scenes=80))
detector = stethoscope.Detector(C=0.1).fit(RunStore("runs/example-stream").tokens("chair"))

image = testbed.scenes(7)[6].image()
for event in stethoscope.stream(adapter, image, QUESTION, detector=detector):
    match event:
        case Token():
            print(event.text, end="", flush=True)
        case MentionCompleted(warned=True):
            print(f" [{event.object}? {event.probability:.0%}]", end="", flush=True)
        case Final():  # the answer and all objects that it names
            print()
            for mention in event.mentions:
                print(f"{mention.probability:4.0%} {mention.object}{'  <- warned' if mention.warned else ''}")

encoded = adapter.encode(image, QUESTION)  # the same in a `generate` call of your own
with stethoscope.WarningStreamer(adapter, encoded, detector) as streamer:
    model, arguments = adapter.prepare_generate([encoded], Generation(max_new_tokens=64))
    model.generate(**arguments, streamer=streamer)
warnings = [event for event in streamer.events if isinstance(event, MentionCompleted) and event.warned]
print(len(warnings), "warnings in", len(streamer.tokens), "tokens")
