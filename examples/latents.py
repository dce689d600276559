"""Lower halves of digits, found by their latents: ``python -m examples.latents``.

The upper half of a digit is given. Gradients through the inverse move a latent to where the upper
half fits, and the prior of latents keeps the lower one likely. ``out/latents.png`` has what was
given, what came out, and the whole digit.
"""

from pathlib import Path

import torch
from torch import Tensor

import mintnet_triton as mint
from examples.digits import LEVELS, digits, fit, new_flow, preprocess
from mintnet_triton.recipes.figures import image_sheet

ROWS = 4  # that are given


def complete(
    flow: mint.MintNet, x: Tensor, steps: int, width: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Images like x (B, 1, 8, 8) in the upper rows, in logits, and the loss after each step.

    Args:
        width: standard deviation that the upper half may differ by.
    """
    flow.requires_grad_(False)
    z = torch.zeros(len(x), *flow.latent_shape, requires_grad=True)
    optimiser, losses = torch.optim.Adam([z], lr=0.1), []
    for _ in range(steps):
        found, _ = flow.inverse(z)
        misfit = (found - x)[:, :, :ROWS].square().sum() / width**2
        loss = 0.5 * (misfit + z.square().sum()) / len(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return flow.inverse(z.detach())[0], torch.stack(losses)


def main(train: int = 400, steps: int = 100, out: Path = Path("out/latents.png")) -> Tensor:
    """Train a flow, complete ten digits and draw them; the losses on the way."""
    images, _ = digits()
    flow = new_flow()
    fit(flow, images[:-300], train)
    whole = images[-10:]
    found, losses = complete(flow, preprocess()(whole)[0], steps)
    given = whole.clone()
    given[:, :, ROWS:] = 0
    rows = {"given": given, "completed": preprocess().to_images(found), "the digit": whole}
    out.parent.mkdir(parents=True, exist_ok=True)
    image_sheet(rows, LEVELS).savefig(out, dpi=150)
    print(f"loss {losses[0]:.1f} at first, {losses[-1]:.1f} at last; see {out}")
    return losses


if __name__ == "__main__":
    main()
