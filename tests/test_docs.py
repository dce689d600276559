"""README and documentation keep their word: snippets run, commands, links and tables are right."""

import importlib.util
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mintnet_triton as mint
from bench import step
from bench.__main__ import parse
from bench.show import report
from bench.show.result import read
from docs import draw
from mintnet_triton.__main__ import _parser

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RESULTS = "bench/results/amd-epyc-zen4-2-cores"


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(PAGES[page]) if kind == language]


# --- Python ---------------------------------------------------------------------------------------


def optional() -> set[str]:
    """The names that libraries are imported by which ``make test`` may do without."""
    return {"FrEIA", "huggingface_hub", "nflows", "normflows", "onnx", "onnxscript", "pyro", "zuko"}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # torchflows's own
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, in a folder with a checkpoint; each uses what those before have left."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tests/data/authors_checkpoint_c3_s8.pth", "checkpoint.pth")
    names: dict[str, object] = {"__name__": "snippet"}
    missing = set()
    for number, code in enumerate(blocks(page, "python"), start=1):
        try:
            exec(compile(code, f"{page}, snippet {number}", "exec"), names)
        except ModuleNotFoundError as error:
            library = str(error.name).split(".")[0]
            if library not in optional():
                raise
            missing.add(library)
    if missing:
        pytest.skip(f"all but the snippets for {', '.join(sorted(missing))}")


# --- commands -------------------------------------------------------------------------------------

MAKE = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


def check_command(line: str) -> None:
    """Raise unless a line of a shell names what there is."""
    words = shlex.split(line, comments=True)
    if "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        assert importlib.util.find_spec(module), f"no module {module}"
        if module == "mintnet_triton":
            _parser().parse_args(arguments)
        elif module == "bench" and arguments:
            parse(arguments)
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= set(MAKE), f"no such target: {targets}"
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", line))):
            assert extra in EXTRAS, f"no extra {extra}"
    elif "/" in words[0]:
        assert words[0].startswith(".venv/bin/") or (ROOT / words[0]).exists(), words[0]
    else:
        assert words[0] in ("cd", "git", "hf", "pytest"), f"unknown command {words[0]}"


def commands(page: str) -> Iterator[str]:
    """Lines of a shell, and what is quoted of such in a sentence."""
    for block in blocks(page, "sh"):
        yield from (line for line in block.splitlines() if line.strip())
    yield from re.findall(r"`((?:make|pip install|python -m) [^`]+)`", PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_known(page: str) -> None:
    for line in commands(page):
        check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "make tset",
        "python -m mintnet_triton trian",
        "python -m mintnet_triton train density --preset digits --epochs",
        "python -m bench.nothing",
        "python -m bench compare one",
        "pip install '.[cpu,nothing]'",
        "rm out",
    ],
)
def test_unknown_commands_are_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line)


# --- links ----------------------------------------------------------------------------------------


def broken_links(page: str, text: str) -> Iterator[str]:
    """Relative links and pictures whose file is not there, or has no such heading."""
    prose = BLOCK.sub("", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name
        if not path.exists():
            yield target
        elif anchor:
            headings = anchors(path.read_text(encoding="utf-8") if name else text)
            if anchor not in headings:
                yield target


def anchors(text: str) -> set[str]:
    """Of headings, as Git hosts and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not list(broken_links(page, PAGES[page]))


def test_broken_links_are_found() -> None:
    text = "# A heading\n[a](nothing.md) [b](#a-heading) [c](#none) [d](README.md) [e](https://x)"
    assert list(broken_links("README.md", text)) == ["nothing.md", "#none"]


# --- tables ---------------------------------------------------------------------------------------


def tied_tables(text: str) -> list[tuple[str, str, str]]:
    """File, heading and rows of the tables that follow a comment ``<!-- FILE: HEADING -->``."""
    return re.findall(r"^<!-- (bench/\S+\.json): (.+?) -->\n+((?:\|.*\n)+)", text, re.MULTILINE)


def tables_of(file: str) -> dict[str, str]:
    """What a committed result has to tell, by heading."""
    result = read(ROOT / file)
    kind = Path(file).stem
    if kind == "run":
        return report.tables(result)
    if kind == "step":
        return {"A training step": step.table(result)}
    if kind == "plus":
        from bench import plus

        return {"A training step beyond the paper": plus.table(result)}
    pytest.importorskip("tqdm")
    from bench import tables

    return {
        result["task"]: tables.table(result),
        "bounds": tables.bounds(result),
        "samples": tables.samples(result),
    }


def test_tables_are_found() -> None:
    text = "a\n<!-- bench/results/m/run.json: Layer, x: y -->\n\n| a |\n| - |\n| 1 |\n\nb\n| c |\n"
    assert tied_tables(text) == [
        ("bench/results/m/run.json", "Layer, x: y", "| a |\n| - |\n| 1 |\n")
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_are_those_of_committed_results(page: str) -> None:
    tied = tied_tables(PAGES[page])
    assert {file for file, _, _ in tied} >= {
        f"{RESULTS}/{name}.json" for name in ("run", "step", "density_digits")
    }
    for file, heading, rows in tied:
        assert rows.strip() == tables_of(file)[heading].strip(), heading


@pytest.mark.parametrize("page", PAGES)
def test_tables_stand_between_empty_lines(page: str) -> None:
    run_together = r"^\|.*\n(?!\||\n|\Z).+|^[^|\n].*\n(?=\|.*\n\| ---)"
    assert not re.findall(run_together, PAGES[page], re.MULTILINE)


def test_every_table_of_benchmarks_is_tied() -> None:
    text = PAGES["docs/benchmarks.md"]
    assert len(re.findall(r"^\| ---", text, re.MULTILINE)) == len(tied_tables(text))


# --- what is kept in step by hand -----------------------------------------------------------------


def test_pictures_are_those_that_are_drawn() -> None:
    drawn = draw.pictures()
    assert drawn.keys() == {path.name for path in draw.PICTURES.glob("*.svg")}
    for name, svg in drawn.items():
        assert (draw.PICTURES / name).read_text(encoding="utf-8") == svg, "python -m docs.draw"


def test_the_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", PAGES["docs/api.md"], re.MULTILINE))
    assert set(mint.__all__) - {"__version__", "calculus"} <= documented


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_packages_are_pinned_in_one_place() -> None:
    """Those of the documentation come on top of the others, and are none of them."""
    pinned = [
        {
            line.split("==")[0].lower()
            for line in path.read_text("utf-8").splitlines()
            if "==" in line
        }
        for path in (ROOT / "requirements.txt", ROOT / "docs" / "requirements.txt")
    ]
    assert pinned[1]
    assert not pinned[0] & pinned[1]
