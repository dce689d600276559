"""Which images are not like those that a flow has seen? ``python -m examples.outliers``.

A density alone is a poor judge, for simple images are likely under any model. A sample may be too
likely, too, which its typicality tells; a ratio leaves out what all images have in common.
"""

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import mintnet_triton as mint
from examples.digits import LEVELS, digits, fit, new_flow, preprocess


def replaced(images: Tensor, share: float) -> Tensor:
    """The images with a share of their pixels taken at random, for a background model."""
    return torch.randint(LEVELS, images.shape).where(torch.rand(images.shape) < share, images)


def strange(images: Tensor) -> dict[str, Tensor]:
    """Images that are no digits, more and more like some."""
    return {
        "noise": torch.randint(LEVELS, images.shape),
        "black": torch.zeros_like(images),
        "negative": LEVELS - 1 - images,
        "upside down": images.flip(2),
    }


@torch.no_grad()
def main(steps: int = 400) -> dict[str, dict[str, float]]:
    """Areas under ROC curves, by outliers and score: 1 is perfect, 0.5 is chance."""
    images, _ = digits()
    seen, held = images[:-300], images[-300:]
    flow, background = new_flow(), new_flow()
    with torch.enable_grad():
        fit(flow, seen, steps)
        fit(background, replaced(seen, 0.2), steps)
    entropy = mint.entropy_estimate(flow, preprocess()(seen)[0])

    def scores(some: Tensor) -> dict[str, Tensor]:  # larger is stranger
        x, _ = preprocess()(some)
        return {
            "density": -mint.log_prob_per_dim(flow, x),
            "typicality": mint.typicality(flow, x, entropy),
            "ratio": -mint.likelihood_ratio(flow, background, x),
        }

    usual, areas = scores(held), {}
    truth = torch.cat([torch.zeros(len(held)), torch.ones(len(held))])
    for kind, some in strange(held).items():
        found = {k: torch.cat([usual[k], one]) for k, one in scores(some).items()}
        areas[kind] = {k: float(roc_auc_score(truth, one)) for k, one in found.items()}
        print(f"{kind:12}", ", ".join(f"{k} {area:.3f}" for k, area in areas[kind].items()))
    return areas


if __name__ == "__main__":
    main()
