"""Finished runs with made-up token tables, as ``stethoscope extract`` leaves them, without a model."""

from pathlib import Path

import pyarrow as pa

from helpers.token_tables import token_table
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.tokens import SCHEMA


def made_up_run(folder, images=200, seed=3, task="chair", change=lambda table: table, **settings):
    """A run directory of one task; ``change`` may alter the token table before it is stored."""
    table = token_table(images, seed=seed, **settings).rename(
        columns={"mass": "attn_image_l00", "noise": "lens_rank_l00"}
    )
    table = change(table.assign(task=task, prompt_hash="0" * 16, labeller=f"{task}/1"))
    store = RunStore(Path(folder))
    store.open_task(task, {"adapter": {"model_id": "made-up"}, "task": {"name": task, "version": "1"}})
    keys = {field.name: field.type for field in SCHEMA}
    rows = {
        name: pa.Table.from_pandas(part, preserve_index=False).cast(
            pa.schema([(column, keys.get(column, pa.float32())) for column in part.columns])
        )
        for name, part in table.groupby("sample_id", sort=False)
    }
    groups = dict(zip(table["sample_id"], table["group"], strict=True))
    store.append([Record(task, name, groups[name], "all", "x.png", "What?") for name in rows], rows)
    store.finish(task, list(rows))
    store.set_status(task, "finished")
    return store.run_dir
