import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.kernels import backend

pytest.importorskip("triton")

from triton import testing
from triton.runtime.errors import OutOfResources

from mintnet_triton.kernels.gpu import configs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MINTNET_TRITON_CACHE", str(tmp_path / "cache"))
    configs._tuned.cache_clear()
    yield tmp_path / "cache" / "tiles.json"
    configs._tuned.cache_clear()


def test_the_fastest_tile_is_kept(cache: Path) -> None:
    flow = mint.MintNet(1, 4, pairs=2, hidden=16, squeezes=1)
    if torch.cuda.is_available():
        flow = flow.cuda()
    arch = configs.architecture(next(flow.parameters()).device)
    first, best, *_ = configs.CANDIDATES["ieee"]

    key = f"{arch} ieee 1x16"

    def timer(step: Callable[[], object]) -> float:
        tile = configs._tuned()[key]
        if tile == first:
            raise OutOfResources(2, 1, "shared memory")
        if tile != best:
            return 2.0
        step()
        return 1.0

    found = mint.tune(flow, batch=1, timer=timer)
    assert set(found) == {key, f"{arch} ieee 4x4"}
    assert found[key] == best
    assert {key: tuple(tile) for key, tile in json.loads(cache.read_text()).items()} == found
    configs._tuned.cache_clear()  # as another process would find it
    assert configs._tuned()[key] == best


def test_steps_are_timed_as_graphs_by_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100, 0, -1))
    captured = []

    def bench(step: Callable[[], object]) -> int:
        captured.append(step)
        return next(times)

    monkeypatch.setattr(testing, "do_bench_cudagraph", bench)
    layer = mint.MintLayer(1, 4, 16)
    if torch.cuda.is_available():
        layer = layer.cuda()
    (found,) = mint.tune(layer, batch=1).values()
    # The last is the fastest.
    assert found == configs.CANDIDATES["ieee"][-1]
    assert len(captured) >= len(configs.CANDIDATES["ieee"])


@pytest.mark.gpu
def test_a_step_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {operand: tiles[:1] for operand, tiles in configs.CANDIDATES.items()}
    monkeypatch.setattr(configs, "CANDIDATES", few)
    layer = mint.MintLayer(1, 4, 16).cuda()
    times = []

    def timer(step: Callable[[], object]) -> float:
        times.append(testing.do_bench_cudagraph(step))
        return float(times[-1])

    mint.tune(layer, batch=2, timer=timer)
    assert all(time > 0 for time in times)


def test_a_tile_that_is_kept_is_used() -> None:
    def used() -> configs.Launch:
        return configs.hidden_tile("sm_90", "ieee", 3, 85, 85, places=2**20)

    before, tile = used(), configs.Tile(64, 64, 16, 8, 5)
    configs.remember("sm_90", "ieee", 3, 85, tile)
    after = used()
    assert after != before
    assert after.blocks[:3] == tile[:3]
    assert (after.num_warps, after.num_stages) == tile[3:]


def test_what_others_found_is_kept(cache: Path) -> None:
    assert configs.remember("sm_90", "half", 3, 4, configs.Tile(1, 2, 3, 4, 5))
    cache.write_text('{"other": [64, 64, 32, 4, 3]}')
    configs.remember("sm_90", "half", 3, 5, configs.Tile(1, 2, 3, 4, 5))
    assert json.loads(cache.read_text()).keys() == {"other", "sm_90 half 3x5"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\x00", b'{"sm_90 ieee 1x2": [64]}', b'{"sm_90 ieee 1x2": "tile!"}'],
)
def test_a_damaged_file_is_warned_of_once_and_replaced(cache: Path, content: bytes) -> None:
    table = configs.hidden_tile("sm_90", "ieee", 1, 2, 16, 100)
    cache.parent.mkdir()
    cache.write_bytes(content)
    configs._tuned.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"tiles cannot be read.*MINTNET_TRITON_CACHE"):
        assert configs.hidden_tile("sm_90", "ieee", 1, 2, 16, 100) == table
    assert configs.hidden_tile("sm_90", "ieee", 1, 2, 16, 100) == table  # without a warning
    configs.remember("sm_90", "ieee", 1, 2, configs.Tile(1, 2, 3, 4, 5))
    assert json.loads(cache.read_text()).keys() == {"sm_90 ieee 1x2"}


@pytest.mark.parametrize("place", ["file", "full"])
def test_tiles_that_cannot_be_kept_hold_in_this_process(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = configs.Tile(16, 16, 16, 4, 5)
    if place == "file":
        (tmp_path / "cache").write_text("no folder")
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(RuntimeWarning, match="cannot be kept for other processes"):
        configs.remember("sm_90", "ieee", 1, 2, tile)
    held = configs.hidden_tile("sm_90", "ieee", 1, 2, 16, 100)
    assert (held.blocks.places, held.num_stages) == (tile.block_m, tile.num_stages)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.warns(RuntimeWarning, match="tiles cannot be read"):
        configs.hidden_tile("sm_90", "ieee", 1, 2, 16, 100)


def test_no_tile_fits() -> None:
    layer = mint.MintLayer(1, 2, 2)
    if torch.cuda.is_available():
        layer = layer.cuda()

    def timer(step: Callable[[], object]) -> float:
        raise OutOfResources(2, 1, "shared memory")

    with pytest.raises(mint.BackendError, match="no tile fits"):
        mint.tune(layer, batch=1, timer=timer)


def test_tuning_needs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = mint.MintLayer(1, 2, 2)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(mint.BackendError, match="on cpu"):
        mint.tune(layer)
    with pytest.raises(ValueError, match="batch"):
        mint.tune(layer, batch=0)


def test_a_layer_that_takes_a_context_has_the_tiles_of_one_that_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(configs.CANDIDATES, "ieee", configs.CANDIDATES["ieee"][:1])
    layer = mint.MintLayer(1, 4, 16, context=2)
    if torch.cuda.is_available():
        layer = layer.cuda()
    assert len(mint.tune(layer, batch=1, timer=lambda step: float(step() is None))) == 1
    assert layer.context == 2
