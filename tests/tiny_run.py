"""A small run that tests start, kill and resume: ``python -m tests.tiny_run TASK FOLDER``."""

import sys
from pathlib import Path

import torch

import mintnet_triton as mint
from mintnet_triton.recipes.data import ImageData, ImageSet
from mintnet_triton.recipes.objectives import Classification, Density
from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.training import TrainingResult, start_from_data, train


def random_data(
    count: int = 24, shape: tuple[int, int, int] = (1, 4, 4), levels: int = 17
) -> ImageData:
    """Noise with labels, the same each time; training and test splits are one."""
    source = torch.Generator().manual_seed(3)
    images = torch.randint(0, levels, (count, *shape), generator=source, dtype=torch.uint8)
    split = ImageSet(images, torch.arange(count) % 3)
    return ImageData("digits", split, split, levels, shape, classes=3)


def tiny_run(task: str, folder: Path, resume: bool = False) -> TrainingResult:
    """Everything that has a state: averages, validation, augmentation, batch norm, a schedule."""
    torch.manual_seed(1)
    model: torch.nn.Module
    objective: Density | Classification
    if task == "density":
        model = mint.MintNet(
            1,
            4,
            pairs=2,
            hidden=4,
            squeezes=1,
            level_spline=17,
            position_bias=2,
            actnorm=True,  # starts from data, which a resumed run must not do again
            factor_out=True,
            conditional_prior=2,
        )
        objective = Density(levels=17, logit_lambda=0.01)
    else:
        model = torch.nn.Sequential(
            torch.nn.Dropout(0.1),  # draws from torch's own generator
            mint.MintClassifier(1, 4, classes=3, pairs=1, squeezes=0, width=4),
        )
        objective = Classification(levels=17)
    recipe = Recipe(
        epochs=8,
        batch_size=4,
        learning_rate=1e-2,
        schedule="milestones",
        milestones=(3, 6),
        flip=True,
        crop=1,
        average=0.9,
        validation=3,
    )
    data = random_data()
    start_from_data(model, data, objective, recipe)
    return train(
        model,
        data,
        objective,
        recipe,
        folder,
        {"model": "tiny"},
        resume=resume,
        checkpoint_every=2,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny_run(sys.argv[1], Path(sys.argv[2]), resume=True)
