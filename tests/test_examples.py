"""The examples run, at a tiny size."""

import ast
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not say so

import mintnet_triton as mint
from tests.processes import Process

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def example(name: str, *packages: str) -> Any:
    """A module of examples, which needs packages that may be missing."""
    for package in packages:
        pytest.importorskip(package)
    return importlib.import_module(f"examples.{name}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    if "__main__" in source:
        assert f"-m examples.{path.stem}" in str(ast.get_docstring(ast.parse(source)))


def write_images(folder: Path, count: int) -> None:
    image = pytest.importorskip("PIL.Image")
    (folder / "below").mkdir(parents=True)
    for number in range(count):
        pixels = torch.randint(0, 256, (9, 14, 3), dtype=torch.uint8).numpy()
        image.fromarray(pixels).save(folder / "below" / f"{number}.png")


def test_own_images(tmp_path: Path) -> None:
    write_images(tmp_path / "photographs", 20)
    own_images = example("own_images", "PIL", "matplotlib")

    out = tmp_path / "out"
    assert own_images.main(tmp_path / "photographs", out, size=8, steps=2) == 2
    assert (out / "images.png").exists()
    assert isinstance(mint.load(out / "flow.safetensors"), mint.MintNet)


def test_own_images_from_an_empty_folder(tmp_path: Path) -> None:
    own_images = example("own_images", "PIL", "matplotlib")

    with pytest.raises(ValueError, match=r"at least two .* got 0"):
        own_images.main(tmp_path)


def test_conditional(tmp_path: Path) -> None:
    conditional = example("conditional", "sklearn", "matplotlib")

    assert 0 <= conditional.main(steps=2, out=tmp_path / "drawn.png") <= 1
    assert (tmp_path / "drawn.png").exists()


def test_outliers() -> None:
    outliers = example("outliers", "sklearn")

    areas = outliers.main(steps=2)
    assert areas.keys() == {"noise", "black", "negative", "upside down"}
    assert all(0 <= area <= 1 for scores in areas.values() for area in scores.values())


def test_mixed_flow() -> None:
    mixed_flow = example("mixed_flow", "sklearn", "zuko")

    nats = mixed_flow.main(steps=2)
    assert nats.keys() == {0, 2}
    assert all(map(math.isfinite, nats.values()))


def test_reverse_kl() -> None:
    reverse_kl = example("reverse_kl")

    divergence, effective = reverse_kl.main(steps=2, batch=8)
    assert divergence > -0.1  # of 4096 samples
    assert 0 < effective <= 1


def test_the_density_of_reverse_kl_sums_up_to_one() -> None:
    reverse_kl = example("reverse_kl")

    axis = torch.linspace(-12, 30, 421, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = reverse_kl.log_density(points).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_latents(tmp_path: Path) -> None:
    latents = example("latents", "sklearn", "matplotlib")

    losses = latents.main(train=2, steps=4, out=tmp_path / "drawn.png")
    assert losses[-1] < losses[0]
    assert (tmp_path / "drawn.png").exists()


def test_solvers(tmp_path: Path) -> None:
    solvers = example("solvers", "matplotlib")

    solved = solvers.main(size=4, out=tmp_path / "drawn.png")
    assert solved["wavefront"] == [16, 16, 16]
    assert solved["α = 1/3.5"][-1] < 16
    assert (tmp_path / "drawn.png").exists()


def test_several_processes(tmp_path: Path) -> None:
    """As ``torchrun`` would start two."""
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        environment = place | {"RANK": rank, "LOCAL_RANK": rank}
        arguments = [str(tmp_path / "run"), "2"]
        processes.append(
            Process("examples.several_processes", arguments, environment, tmp_path / rank)
        )
    ends = [process.finish() for process in processes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "2 steps" in ends[0][1]
    assert not ends[1][1]


def test_series() -> None:
    from examples import series

    nats = series.main(number=64, steps=2)
    assert nats.keys() == {"truth", "Gaussians", "flow"}
    assert all(map(math.isfinite, nats.values()))


def test_the_density_of_the_series_is_exact() -> None:
    """By the change of variables the other way, from the series to what is bent."""
    from examples import series

    drawn, log_density = series.draw(100)
    bent = drawn.squeeze(1).double()
    unbent = series.hidden_process().log_prob(torch.asinh(bent))
    expected = unbent - 0.5 * bent.square().log1p().sum(1)
    torch.testing.assert_close(log_density, expected, rtol=1e-3, atol=1e-2)


def test_volume() -> None:
    pytest.importorskip("sklearn")
    from examples import volume

    bits = volume.main(steps=2)
    assert bits.keys() == {"frames", "films"}
    assert all(map(math.isfinite, bits.values()))


def test_films_drift() -> None:
    pytest.importorskip("sklearn")
    from examples import volume

    image = torch.arange(64).view(1, 8, 8)
    (film,) = volume.films(image)[0]
    assert film.shape == (volume.FRAMES, 8, 8)
    moves = [image[0].roll(way, (0, 1)) for way in volume.DIRECTIONS]
    assert torch.equal(film[0], image[0])
    assert any(torch.equal(film[1], move) for move in moves)
