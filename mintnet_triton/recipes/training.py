"""Training a flow on images, by maximum likelihood."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from mintnet_triton.checks import NonFiniteError
from mintnet_triton.flow import MintNet
from mintnet_triton.images import bits_per_dim


@dataclass(frozen=True)
class DensityRecipe:
    """How to train a flow; Adam's other arguments are the paper's (AMSGrad, eps 1e-4)."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3  # decays to 0 along a cosine
    levels: int = 256
    logit_lambda: float = 0.05
    seed: int = 0


class DivergedError(ArithmeticError):
    """Training met a loss that is not finite."""


def train_density(flow: MintNet, images: Tensor, recipe: DensityRecipe) -> list[float]:
    """Train a flow in place, with a progress bar of bits per dimension.

    Args:
        flow: over logits of the images.
        images: (N, C, H, W), uint8, on the flow's device.
        recipe: how.

    Returns:
        Training bits per dimension of every step.

    Raises:
        DivergedError: the loss is not finite; names the step.
    """
    generator = torch.Generator(images.device).manual_seed(recipe.seed)
    order = torch.Generator().manual_seed(recipe.seed)
    dataset = TensorDataset(images)
    sampler = RandomSampler(dataset, num_samples=recipe.steps * recipe.batch_size, generator=order)
    batches = DataLoader(dataset, batch_size=recipe.batch_size, sampler=sampler)
    optimiser = Adam(flow.parameters(), lr=recipe.learning_rate, eps=1e-4, amsgrad=True)
    schedule = CosineAnnealingLR(optimiser, recipe.steps)
    history = []
    progress = tqdm(batches, desc="training", unit="step", mininterval=0.5)
    for step, (batch,) in enumerate(progress):
        optimiser.zero_grad()
        try:
            loss = bits_per_dim(flow, batch, recipe.levels, recipe.logit_lambda, generator).mean()
        except NonFiniteError as error:
            raise DivergedError(f"at step {step}, {error}; try a smaller learning rate") from error
        history.append(loss.item())
        if not math.isfinite(history[-1]):
            raise DivergedError(
                f"the loss at step {step} is {history[-1]}; try a smaller learning rate than "
                f"{recipe.learning_rate}"
            )
        loss.backward()
        optimiser.step()
        schedule.step()
        progress.set_postfix(bpd=f"{history[-1]:.3f}", refresh=False)
    return history


@torch.no_grad()
def evaluate_density(flow: MintNet, images: Tensor, recipe: DensityRecipe) -> Tensor:
    """Bits per dimension (N,) of each image, one draw of the dequantisation noise."""
    generator = torch.Generator(images.device).manual_seed(recipe.seed)
    batches = torch.split(images, 256)
    return torch.cat(
        [
            bits_per_dim(flow, batch, recipe.levels, recipe.logit_lambda, generator)
            for batch in batches
        ]
    )
