"""The token table on disk: damage is noticed, and other readers of Parquet see the same rows."""

import random

from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.core.errors import ArtefactError
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.storage.run_dir import RunStore


def evaluate(folder, limit=6, **settings):
    return Evaluator(run_dir=folder, features=TinyFeatures(), limit=limit, **settings).run(TinyAdapter(), TinyTask(8))


def test_no_flipped_bit_of_the_token_table_goes_unseen(tmp_path):
    run = tmp_path / "run"
    evaluate(run)
    whole, data = RunStore(run).tokens(), (run / "tokens.parquet").read_bytes()
    draw, refused, messages = random.Random(0), 0, set()
    for _ in range(300):
        position, bit = draw.randrange(len(data)), draw.randrange(8)
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        (run / "tokens.parquet").write_bytes(flipped)
        try:
            table = RunStore(run).tokens()
        except ArtefactError as error:
            messages.add(str(error))
            refused += 1
        else:
            assert table.equals(whole)  # a byte that means nothing
    assert refused > 200
    remedy = "; delete it and run `stethoscope extract` again"
    assert all("tokens.parquet is damaged" in text and text.endswith(remedy) for text in messages)


def test_other_readers_of_parquet_see_no_difference(tmp_path):
    import pandas as pd

    evaluate(tmp_path)
    assert len(pd.read_parquet(tmp_path / "tokens.parquet")) == len(RunStore(tmp_path).tokens()) > 0
