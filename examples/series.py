"""A flow over series, where the truth is known: ``python -m examples.series``.

Yearly rhythm and chance make a Gaussian autoregression, which a monotone function then bends: its
density is exact, so that a flow can be told how far from it it is, in nats a step.
"""

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import mintnet_triton as mint

LENGTH = 24


def hidden_process() -> MultivariateNormal:
    """Of the months of two years, each with the covariance that a month apart it has."""
    months = torch.arange(LENGTH, dtype=torch.float64)
    apart = (months[:, None] - months).abs()
    covariance = 0.7 * 0.8**apart + 0.29 * torch.cos(2 * torch.pi * apart / 12)
    return MultivariateNormal(torch.zeros_like(months), covariance + 0.01 * torch.eye(LENGTH))


def draw(number: int) -> tuple[Tensor, Tensor]:
    """Series (B, 1, L), and the log-density (B,) of each."""
    process = hidden_process()
    x = process.sample((number,))
    bent = torch.sinh(x)  # heavy tails
    log_density = process.log_prob(x) - torch.cosh(x).log().sum(1)
    return bent.unsqueeze(1).float(), log_density


def main(number: int = 20_000, steps: int = 300) -> dict[str, float]:
    """Train for some steps; nats a step of the truth, one Gaussian a month, and the flow."""
    torch.manual_seed(0)
    series, _ = draw(number)
    flow = mint.MintNet(channels=1, image_size=(LENGTH,), pairs=4, hidden=16, squeezes=1)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        loss = -flow.log_prob(series[torch.randint(number, (128,))]).mean() / LENGTH
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f} nats a step")
    new, exact = draw(2_000)
    gaussian = Normal(series.mean(0), series.std(0)).log_prob(new).flatten(1).sum(1)
    with torch.no_grad():
        found = {"truth": exact, "Gaussians": gaussian, "flow": flow.log_prob(new)}
    nats = {name: -float(one.mean()) / LENGTH for name, one in found.items()}
    print(", ".join(f"{name}: {one:.3f} nats a step" for name, one in nats.items()))
    print("a sample:", " ".join(f"{value:.1f}" for value in flow.sample(1).flatten().tolist()))
    return nats


if __name__ == "__main__":
    main()
