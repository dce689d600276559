"""Real digits, and a flow that is trained on them: what other examples begin with."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import mintnet_triton as mint

LEVELS, LOGIT_LAMBDA = 17, 0.05


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8), int64, from 0 to 16, and labels (1797,), in a fixed random order."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).long().view(-1, 1, 8, 8)
    return images[order], torch.from_numpy(labels).long()[order]


def preprocess() -> mint.ImagePreprocess:
    return mint.ImagePreprocess(LEVELS, LOGIT_LAMBDA)


def new_flow(context: int | None = None) -> mint.MintNet:
    """Untrained, the same each time."""
    torch.manual_seed(0)
    return mint.MintNet(1, 8, pairs=4, hidden=16, squeezes=1, context=context)


def fit(flow: mint.MintNet, images: Tensor, steps: int, context: Tensor | None = None) -> float:
    """Train for some steps; the bits per dimension of the last batch."""
    optimiser = torch.optim.Adam(flow.parameters(), lr=5e-3, eps=1e-4, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    bits = torch.tensor(torch.nan)
    for step in range(steps):
        some = torch.randint(len(images), (64,))
        own = None if context is None else context[some]
        bits = mint.bits_per_dim(flow, images[some], LEVELS, LOGIT_LAMBDA, context=own).mean()
        optimiser.zero_grad()
        bits.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {bits.item():.3f} bits per dimension")
    return float(bits.detach())
