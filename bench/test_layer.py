"""One Mint layer against the paper's formulas read literally, at the scales of the CIFAR-10 model.

Every case first checks that both give the same values: a wrong result is not timed.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.naive import NaiveMintLayer
from mintnet_triton import MintLayer

SCALES = {"3x32x32_K85": (3, 32, 85), "12x16x16_K21": (12, 16, 21), "48x8x8_K5": (48, 8, 5)}
RIVALS = {"mintnet_triton": MintLayer, "naive": NaiveMintLayer}
BATCH = 8


def forward(layer: MintLayer, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def training_step(layer: MintLayer, x: Tensor) -> None:
    layer.zero_grad()
    y, log_det = layer(x)
    (y.square().sum() / 2 - log_det.sum()).backward()


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("work", [forward, training_step])
@pytest.mark.parametrize("scale", SCALES)
def test_layer(
    benchmark: BenchmarkFixture,
    scale: str,
    work: Callable[[MintLayer, Tensor], None],
    rival: str,
) -> None:
    channels, size, hidden = SCALES[scale]
    torch.manual_seed(0)
    truth = MintLayer(channels, size, hidden)
    x = torch.randn(BATCH, channels, size, size)
    layer = RIVALS[rival](channels, size, hidden)
    layer.load_state_dict(truth.state_dict())
    for computed, expected in zip(layer(x), truth.double()(x.double()), strict=True):
        torch.testing.assert_close(computed.double(), expected, rtol=1e-4, atol=1e-4)

    benchmark.group = f"{scale} {work.__name__}"
    benchmark.extra_info.update(scale=scale, work=work.__name__, rival=rival, batch=BATCH)
    benchmark.pedantic(work, args=(layer, x), rounds=9, warmup_rounds=2)
