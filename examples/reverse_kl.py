"""A flow learns a density that is known up to a constant: ``python -m examples.reverse_kl``.

Its own samples are what it is trained on, so that gradients go through the inverse: by the implicit
function theorem, at the memory of a forward pass. The density here is a bent Gaussian whose
constant is known, too: the divergence that is minimised is a true one, and ends near zero.
"""

import torch
from torch import Tensor
from torch.distributions import Normal

import mintnet_triton as mint


def log_density(x: Tensor) -> Tensor:
    """At points (B, 2): N(0, 1) along the first axis, about a parabola of it along the second."""
    first, second = x.unbind(1)
    along, across = Normal(0.0, 1.0), Normal(first**2 - 1, 1.0)
    total: Tensor = along.log_prob(first) + across.log_prob(second)
    return total


def main(steps: int = 300, batch: int = 128) -> tuple[float, float]:
    """Train; the divergence in nats, and the share of samples that are worth an exact one."""
    torch.manual_seed(0)
    # Points as images of one pixel: nothing to convolve, and two colours that see each other.
    flow = mint.MintNet(2, 1, pairs=4, hidden=16, squeezes=0, kernel_size=1)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        x, log_prob = flow.sample_and_log_prob(batch)
        divergence = (log_prob - log_density(x.flatten(1))).mean()
        optimiser.zero_grad()
        divergence.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {divergence.item():.3f} nats from the density")
    with torch.no_grad():
        x, log_prob = flow.sample_and_log_prob(4096)
        ratio = log_density(x.flatten(1)) - log_prob
        effective = float((2 * ratio.logsumexp(0) - (2 * ratio).logsumexp(0)).exp() / len(ratio))
    print(f"{-ratio.mean():.3f} nats; as weighted samples, {effective:.0%} of them count")
    return -float(ratio.mean()), effective


if __name__ == "__main__":
    main()
