"""All that changes while training: what a checkpoint holds, and takes back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import AveragedModel

from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.sharding import shard, shared_out, whole

_COUNTERS = ("step", "epoch", "image", "seconds", "best")


@dataclass
class TrainingState:
    """All that changes while training, and that a checkpoint holds."""

    model: nn.Module
    optimiser: Adam
    schedule: LRScheduler
    average: AveragedModel | None
    step: int = 0
    epoch: int = 0
    image: int = 0  #: images of the epoch that have been used up
    seconds: float = 0.0  #: of training, over all calls
    best: float = math.inf

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, sharded: bool = False) -> "TrainingState":
        average = None
        if recipe.average is not None:
            average = AveragedModel(model, device=next(model.parameters()).device)
        if sharded:  # after the copy, before the optimiser takes the parameters
            shard(model)
            if average is not None:
                shard(average.module)
        optimiser = Adam(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            amsgrad=recipe.amsgrad,
            weight_decay=recipe.weight_decay,
            fused=True,  # so that it can be told on the device to leave all as it is
        )
        schedule: LRScheduler
        if recipe.schedule == "cosine":
            schedule = CosineAnnealingLR(optimiser, recipe.epochs or recipe.steps or 0)
        else:
            schedule = MultiStepLR(optimiser, list(recipe.milestones), recipe.gamma)
        return cls(model, optimiser, schedule, average)

    def finished(self, recipe: Recipe) -> bool:
        if recipe.steps is not None:
            return self.step >= recipe.steps
        assert recipe.epochs is not None
        return self.epoch >= recipe.epochs

    def evaluated(self) -> nn.Module:
        """The model to judge: the moving average, where there is one."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module
        return averaged

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """What a checkpoint holds; every process asks for it, those that write keep it."""
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            **{name: whole(part.state_dict(), keep) for name, part in self._parts()},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self, name, state[name])
        optimiser = state["optimiser"]
        # That of an earlier version may not say so.
        groups = [{**group, "fused": True} for group in optimiser["param_groups"]]
        state = {**state, "optimiser": {**optimiser, "param_groups": groups}}
        for name, part in self._parts():
            part.load_state_dict(shared_out(state[name], part))
        torch.set_rng_state(state["random"])
        if torch.cuda.is_initialized():
            # There may have been more GPUs.
            torch.cuda.set_rng_state_all(state["random_cuda"][: torch.cuda.device_count()])

    def _parts(self) -> list[tuple[str, Any]]:
        names = ("model", "optimiser", "schedule", "average")
        return [(name, part) for name in names if (part := getattr(self, name)) is not None]

    def finite(self) -> bool:
        return all(bool(whole(p.isfinite().all())) for p in self.model.parameters())
