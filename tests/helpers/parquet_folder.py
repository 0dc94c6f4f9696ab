"""Data sets of Parquet files as the hub has them, with pictures inside."""

from pathlib import Path

import datasets


def write_split(folder: Path, rows: list[dict], pictures: list[bytes], name: str, image: str = "image") -> Path:
    """Write one Parquet file of rows with the bytes of a picture each; give the folder."""
    data = datasets.Dataset.from_list(rows).add_column(image, [{"path": None, "bytes": data} for data in pictures])
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    data.cast_column(image, datasets.Image()).to_parquet(path)
    return folder
