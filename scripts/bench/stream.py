"""What warnings cost while the embedded model writes: ``stream`` against ``generate``.

    python scripts/bench/stream.py                    # 24 pictures, the mean of 5 rounds
    python scripts/bench/stream.py --features default --delays 0

The detector is a logistic regression on ``features=fast``, trained here on --scenes captions; that of ``default`` also
reads hidden states and looks for the named objects among the image tokens. Both ways alternate
picture by picture, so that other work on the machine falls on both; CPU time of the process is told beside the time
of the clock. The mentions of the finished answer, which ``generate`` does not tell, are found when they are read: that
is outside the time of the stream.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Generation
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import RunStore
from stethoscope.streaming import Token
from stethoscope.tasks.chair import Chair

QUESTION = "Please describe this image in detail."
FAST = ("uncertainty", "position", "attention", "lens")
GROUPS = {"fast": FAST, "default": (*FAST, "hidden")}


def main() -> None:
    """Train, measure, and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 3, 7], help="steps that a token may wait")
    parser.add_argument("--features", choices=list(GROUPS), default="fast", help="that the detector reads")
    parser.add_argument("--scenes", type=int, default=48, help="captions that the detector learns from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter, generation = stethoscope.load("testbed"), Generation(max_new_tokens=128)
    detector = _detector(adapter, options.scenes, GROUPS[options.features])
    pictures = [scene.image() for scene in testbed.scenes(options.pictures)]

    def generate(picture: Image) -> int:
        return len(adapter.generate([adapter.encode(picture, QUESTION)], generation)[0].token_ids)

    def streamed(**options: Any) -> Callable[[Image], int]:
        return lambda picture: _tokens(stethoscope.stream(adapter, picture, QUESTION, generation=generation, **options))

    ways = {"generate": generate, "stream, no detector": streamed()}
    ways |= {f"detector, delay={delay}": streamed(detector=detector, delay=delay) for delay in options.delays}
    seconds, busy, tokens = ({name: 0.0 for name in ways} for _ in range(3))
    for way in ways.values():
        way(pictures[0])
    for _ in range(options.rounds):
        for picture in pictures:
            for name, way in ways.items():
                start = time.perf_counter(), time.process_time()
                tokens[name] += way(picture)
                seconds[name] += time.perf_counter() - start[0]
                busy[name] += time.process_time() - start[1]
    if len(set(tokens.values())) != 1:
        raise SystemExit(f"the ways wrote different numbers of tokens: {tokens}")
    print(f"{'':22}{'ms/token':>10}{'CPU ms/token':>14}{'time':>9}{'CPU':>9}")
    for name, count in tokens.items():
        more = [spent[name] / spent["generate"] - 1 for spent in (seconds, busy)]
        each = [spent[name] / count * 1e3 for spent in (seconds, busy)]
        print(f"{name:22}{each[0]:10.3f}{each[1]:14.3f}{more[0]:+9.1%}{more[1]:+9.1%}")


def _detector(adapter: Adapter, scenes: int, groups: tuple[str, ...]) -> stethoscope.Detector:
    with tempfile.TemporaryDirectory() as folder:
        features = FeatureSet(groups=groups)
        stethoscope.Evaluator(features=features, run_dir=Path(folder), batch_size=24).run(adapter, Chair(scenes=scenes))
        return stethoscope.Detector(C=0.1).fit(RunStore(Path(folder)).tokens("chair"))


def _tokens(items: Iterable[object]) -> int:
    """Count the tokens of a stream."""
    return sum(isinstance(item, Token) for item in items)


if __name__ == "__main__":
    main()
