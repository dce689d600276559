"""A Mint pair inside a flow of zuko's, among its own transforms: ``python -m examples.mixed_flow``.

Convolutions see pixels where they are; couplings mix all of them. Needs zuko.
"""

from typing import Any

import torch
import zuko
from torch import nn
from torch.distributions import Normal
from torch.distributions.transforms import ReshapeTransform

import mintnet_triton as mint
from examples.digits import digits, preprocess
from mintnet_triton.adapters.zuko import MintTransform

SIZE = 64


def new_flow(pairs: int) -> nn.Module:
    """So many Mint pairs over 8 x 8 pixels, then two couplings of NICE."""
    ours = [MintTransform(mint.MintPair(channels=1, size=8, hidden=8)) for _ in range(pairs)]
    shapes = torch.Size((1, 8, 8)), torch.Size((SIZE,))
    flat = zuko.lazy.UnconditionalTransform(ReshapeTransform, *shapes)
    couplings = zuko.flows.NICE(SIZE, transforms=2, hidden_features=[128]).transform
    normal = torch.zeros(SIZE), torch.ones(SIZE)
    base = zuko.lazy.UnconditionalDistribution(Normal, *normal, buffer=True)
    flow: nn.Module = zuko.lazy.Flow([*ours, flat, couplings], base)
    return flow


def main(steps: int = 300) -> dict[int, float]:
    """Train with no pair and with two: nats a pixel of digits that were held out."""
    torch.manual_seed(0)
    x, _ = preprocess()(digits()[0])
    seen, held = x[:-300], x[-300:]
    nats = {}
    for pairs in (0, 2):
        flow: Any = new_flow(pairs)
        optimiser = torch.optim.Adam(flow.parameters(), lr=3e-3, eps=1e-4)
        for _ in range(steps):
            loss = -flow().log_prob(seen[torch.randint(len(seen), (64,))]).mean() / SIZE
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            nats[pairs] = -float(flow().log_prob(held).mean()) / SIZE
            drawn = flow().sample((4,))  # through the inverses of both libraries
        print(f"{pairs} Mint pairs: {nats[pairs]:.3f} nats a pixel; drew {tuple(drawn.shape)}")
    return nats


if __name__ == "__main__":
    main()
