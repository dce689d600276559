"""Files in the schema of the Hugging Face hub."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def write_rows(folder: Path, splits: dict[str, list[dict[str, Any]]], shards: int = 1) -> None:
    """Rows of each split, in so many files."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        for shard in range(shards):
            part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
            name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(part), folder / name)


def write_parquet(
    folder: Path, column: str, shape: tuple[int, ...], splits: dict[str, int]
) -> None:
    """Two files a split, as the hub has them; image i of a split is filled with i."""
    rows = {
        split: [
            {column: {"bytes": png(np.full(shape, i, np.uint8)), "path": None}, "label": i % 10}
            for i in range(count)
        ]
        for split, count in splits.items()
    }
    write_rows(folder, rows, shards=2)
