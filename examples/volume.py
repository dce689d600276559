"""A flow over short films of drifting digits: ``python -m examples.volume``.

Every film is a real digit of 8 x 8 pixels and 17 levels that drifts for four frames, one pixel a
frame: a volume (1, 4, 8, 8). A flow over single frames cannot know where the digit was before.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import mintnet_triton as mint

FRAMES, LEVELS = 4, 17
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def films(images: Tensor) -> Tensor:
    """Digits (B, 8, 8) that drift, each in a direction of its own: (B, 1, frames, 8, 8)."""
    drifting = []
    for image, way in zip(images, torch.randint(len(DIRECTIONS), (len(images),)), strict=True):
        dy, dx = DIRECTIONS[way]
        drifting.append(torch.stack([image.roll((dy * t, dx * t), (0, 1)) for t in range(FRAMES)]))
    return torch.stack(drifting).unsqueeze(1)


def fit(flow: mint.MintNet, seen: Tensor, new: Tensor, steps: int) -> float:
    """Train for some steps; bits per dimension of images that it has not seen."""
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(steps):
        some = seen[torch.randint(len(seen), (32,))]
        loss = mint.bits_per_dim(flow, some, LEVELS).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f} bits per dimension")
    with torch.no_grad():
        return float(mint.bits_per_dim(flow, new, LEVELS).mean())


def main(steps: int = 300) -> dict[str, float]:
    """Train a flow over frames and one over films, and draw a film that the latter has sampled."""
    torch.manual_seed(0)
    digits = torch.from_numpy(load_digits().images).long()
    seen, new = films(digits[:1400]), films(digits[1400:])
    frames = mint.MintNet(channels=1, image_size=(8, 8), pairs=2, hidden=16, squeezes=1)
    moving = mint.MintNet(channels=1, image_size=(FRAMES, 8, 8), pairs=2, hidden=16, squeezes=1)
    bits = {"films": fit(moving, seen, new, steps)}
    seen, new = (one.movedim(2, 1).flatten(0, 1) for one in (seen, new))
    bits["frames"] = fit(frames, seen, new, steps)
    print(", ".join(f"{name}: {one:.3f} bits per dimension" for name, one in bits.items()))
    film = mint.ImagePreprocess(LEVELS).to_images(moving.sample(1))[0, 0]
    for row in film.transpose(0, 1):
        print("   ".join("".join(" .:*#"[level // 4] for level in frame) for frame in row))
    return bits


if __name__ == "__main__":
    main()
