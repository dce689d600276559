"""The README's Python runs, from top to bottom."""

import re
from pathlib import Path

import pytest

from bench import report, step
from bench.run import read

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    result = names["result"]
    assert bool(result.converged.all())  # type: ignore[attr-defined]
    assert (tmp_path / "flow.safetensors").exists()


def tables_from_results(text: str) -> list[tuple[str, str, str]]:
    """File, heading and rows of the tables that follow a comment ``<!-- FILE: HEADING -->``."""
    return re.findall(r"^<!-- (bench/\S+\.json): (.+?) -->\n+((?:\|.*\n)+)", text, re.MULTILINE)


def test_tables_are_found() -> None:
    text = "a\n<!-- bench/results/m/run.json: Layer, x: y -->\n\n| a |\n| - |\n| 1 |\n\nb\n| c |\n"
    assert tables_from_results(text) == [
        ("bench/results/m/run.json", "Layer, x: y", "| a |\n| - |\n| 1 |\n")
    ]


def test_tables_of_speed_are_those_of_committed_results() -> None:
    for file, heading, rows in tables_from_results(README.read_text(encoding="utf-8")):
        assert rows.strip() == report.tables(read(README.parent / file))[heading], heading


@pytest.mark.parametrize("task", ["density", "classify"])
def test_the_tables_of_experiments_are_of_their_results(task: str) -> None:
    pytest.importorskip("tqdm")
    from bench import tables

    result = read(README.parent / f"bench/results/amd-epyc-zen4-2-cores/{task}_digits.json")
    assert tables.table(result) in README.read_text(encoding="utf-8")


def test_the_table_of_a_training_step_is_of_its_result() -> None:
    result = read(README.parent / "bench/results/amd-epyc-zen4-2-cores/step.json")
    assert step.table(result) in README.read_text(encoding="utf-8")
