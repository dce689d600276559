"""Models of other libraries beside a MintNet of the same size, on the same images.

They are other functions, so that nobody can say of one that it computes what another does: each is
compared with itself in float64 where its log-det is exact, and gradients and samples have to be
finite.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.contest.cases import FLOAT32, WrongResultError, gate, random_flow
from bench.contest.rivals import UnavailableError
from bench.measure.race import Contender, Result, times_of, verdict
from bench.measure.timing import Clock, Work
from bench.peers import PEERS, FixedPointError


def measure_models(preset: str | None, batch: int, clock: Clock) -> Result:
    """Log-density, training step and sampling of the MintNet of a preset, and of every peer.

    The number of parameters is that of the MintNet, to within a tenth.
    """
    torch.manual_seed(0)
    flow = random_flow(preset)
    size = sum(parameter.numel() for parameter in flow.parameters())
    makers: dict[str, Callable[[], Any]] = {"ours": lambda: flow}
    channels, height, width = flow.image_shape
    shape = (channels, height, width)
    makers |= {name: partial(peer.build, shape, size) for name, peer in PEERS.items()}
    exact = {"ours", *(name for name, peer in PEERS.items() if peer.log_det == "exact")}
    x = torch.randn(batch, *flow.image_shape).to(clock.device)
    entrants: dict[str, Entrant] = {}
    failures: dict[str, Result] = {}
    for name, make in makers.items():
        try:
            entrants[name] = Entrant(make().to(clock.device), x, name in exact)
        except ModuleNotFoundError as error:
            failures[name] = verdict(UnavailableError(str(error)))
        except Exception as error:  # whatever it is, the others are wanted
            failures[name] = verdict(error)
    passes: Result = {}
    for pass_ in ("forward", "training", "inverse"):
        rivals, contenders = dict(failures), {}
        for name, entrant in entrants.items():
            contender = entrant.contender(pass_)
            try:
                rivals[name] = contender.check()
                contenders[name] = contender
            except FixedPointError as error:  # random weights, which a library cannot invert
                rivals[name] = verdict(UnavailableError(str(error)))
            except Exception as error:
                rivals[name] = verdict(error)
        for name, times in times_of(contenders, clock).items():
            rivals[name]["ms"] = times
        passes[pass_] = {"rivals": rivals}
    return {"mode": "float32", "batch": batch, "parameters": size, "passes": passes}


class Entrant:
    """A model with ``log_prob`` and ``sample``, and what it is timed at."""

    def __init__(self, model: Any, x: Tensor, exact: bool) -> None:
        self.model, self.x, self.exact = model, x, exact
        with torch.no_grad():
            model.log_prob(x)  # the first batch sets what depends on data

    def contender(self, pass_: str) -> Contender:
        works: dict[str, tuple[Work, Callable[[], Result]]] = {
            "forward": (self.forward, self._check_forward),
            "training": (self.training, lambda: _finite(self.training())),
            "inverse": (self.sample, lambda: _finite([self.sample()])),
        }
        work, check = works[pass_]
        self.model.train(pass_ == "training")
        return Contender(check, [(work, 1)])

    @torch.no_grad()
    def forward(self) -> Tensor:
        log_prob: Tensor = self.model.log_prob(self.x)
        return log_prob

    def training(self) -> list[Tensor]:
        self.model.zero_grad(set_to_none=True)
        (-self.model.log_prob(self.x).mean()).backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return [gradient for gradient in gradients if gradient is not None]

    def sample(self) -> Tensor:
        samples: Tensor = self.model.sample(len(self.x))
        return samples

    def _check_forward(self) -> Result:
        if not self.exact:
            return _finite([self.forward()])
        with torch.no_grad():
            expected = copy.deepcopy(self.model).double().log_prob(self.x.double())
        return gate(FLOAT32, {"log_prob": self.forward()}, {"log_prob": expected})


def _finite(values: list[Tensor]) -> Result:
    if not all(bool(value.isfinite().all()) for value in values):
        raise WrongResultError("wrong: a result is not finite")
    return {}
