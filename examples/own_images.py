"""A flow over your own images: ``python -m examples.own_images FOLDER``.

Images are cropped to squares and made small. The model is left in ``out/own_images``, beside a
picture of images that were held out, their reconstructions, and samples.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.recipes.figures import image_sheet

SUFFIXES = (".png", ".jpg", ".jpeg")


def read(folder: Path, size: int) -> Tensor:
    """Images of a folder and those below it, (N, 3, size, size), from 0 to 255."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise ValueError(f"folder must hold at least two of {SUFFIXES}, got {len(paths)}")
    squares = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in paths]
    return torch.from_numpy(np.stack([np.asarray(one) for one in squares])).permute(0, 3, 1, 2)


def main(folder: Path, out: Path = Path("out/own_images"), size: int = 32, steps: int = 300) -> int:
    """Train, invert and draw; returns how many reconstructions are the very images."""
    torch.manual_seed(0)
    images = read(folder, size)
    held, seen = images[torch.randperm(len(images))].tensor_split([max(1, len(images) // 10)])
    flow = mint.MintNet(3, size, pairs=4, hidden=32, squeezes=2)
    optimiser = torch.optim.Adam(flow.parameters(), lr=2e-3, eps=1e-4, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        batch = seen[torch.randint(len(seen), (32,))]
        loss = mint.bits_per_dim(flow, batch).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} bits per dimension")
    preprocess = mint.ImagePreprocess()
    again = mint.reconstruct(flow, preprocess(held[:8])[0])
    back, drawn = preprocess.to_images(again.x), preprocess.to_images(flow.sample(8))
    rows = {"held out": held[:8], "from their latents": back, "samples": drawn}
    out.mkdir(parents=True, exist_ok=True)
    image_sheet(rows, levels=256).savefig(out / "images.png", dpi=150)
    mint.save(flow, out / "flow.safetensors")
    print(f"{again}; see {out}")
    return int((back == held[:8]).flatten(1).all(1).sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
