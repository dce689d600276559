"""Files in the schema of the Hugging Face hub."""

import io
from pathlib import Path

import numpy as np
import pytest


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def write_parquet(
    folder: Path, column: str, shape: tuple[int, ...], splits: dict[str, int]
) -> None:
    """Two files a split, as the hub has them; image i of a split is filled with i."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        rows = [
            {column: {"bytes": png(np.full(shape, i, np.uint8)), "path": None}, "label": i % 10}
            for i in range(count)
        ]
        for shard in range(2):
            table = pyarrow.Table.from_pylist(rows[shard * count // 2 : (shard + 1) * count // 2])
            parquet.write_table(table, folder / f"{split}-{shard:05d}-of-00002.parquet")
