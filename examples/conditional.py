"""Digits to order, by a flow that is given their labels: ``python -m examples.conditional``.

The label is a context: in each layer it moves biases and t, sample by sample. What is drawn, ten
samples of each class, is in ``out/conditional.png``. By Bayes' rule, the same flow tells classes
apart, for which it was not trained.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mintnet_triton as mint
from examples.digits import LEVELS, digits, fit, new_flow, preprocess
from mintnet_triton.recipes.figures import image_sheet


@torch.no_grad()
def classify(flow: mint.MintNet, images: Tensor) -> Tensor:
    """The likeliest class (B,) of images, all classes being equally likely beforehand."""
    x, _ = preprocess()(images)
    classes = torch.eye(10)
    log_density = [flow.log_prob(x, one.expand(len(x), 10)) for one in classes]
    return torch.stack(log_density).argmax(0)


def main(steps: int = 400, out: Path = Path("out/conditional.png")) -> float:
    """Train, draw, and classify images that were held out: the share that is right."""
    images, labels = digits()
    seen, held = images[:-300], images[-300:]
    flow = new_flow(context=10)
    fit(flow, seen, steps, F.one_hot(labels[:-300], 10).float())

    samples = flow.sample(100, context=torch.eye(10).repeat_interleave(10, 0))
    rows = preprocess().to_images(samples).split(10)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet = {str(digit): row for digit, row in enumerate(rows)}
    image_sheet(sheet, LEVELS).savefig(out, dpi=150)

    right = float((classify(flow, held) == labels[-300:]).float().mean())
    print(f"{right:.1%} of {len(held)} digits classified by Bayes' rule; samples are in {out}")
    return right


if __name__ == "__main__":
    main()
