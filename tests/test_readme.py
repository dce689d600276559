"""The README's Python runs, from top to bottom."""

import re
from pathlib import Path

import pytest

from bench.ratios import table

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    result = names["result"]
    assert bool(result.converged.all())  # type: ignore[attr-defined]
    assert (tmp_path / "flow.safetensors").exists()


def test_the_table_of_speeds_is_that_of_the_committed_result() -> None:
    result = README.parent / "bench" / "results" / "amd-epyc-zen3-2-cores" / "layer.json"
    assert table(result) in README.read_text(encoding="utf-8")


def test_the_table_of_work_is_that_of_the_kernels() -> None:
    pytest.importorskip("triton")
    from bench import work

    result = README.parent / "bench" / "results" / "work.md"
    assert result.read_text(encoding="utf-8") == work.table() + "\n"
