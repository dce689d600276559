"""How a model is trained: every hyperparameter, read from a preset and changed by name."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from mintnet_triton.checks import check_integer, check_number
from mintnet_triton.flow import Parts
from mintnet_triton.presets import load_preset, model_arguments

Schedule = Literal["cosine", "milestones"]

#: the sections of a preset that a task reads: the model, and its training
SECTIONS = {
    "density": ("density", "density_training"),
    "classify": ("classifier", "classifier_training"),
}

_MAY_BE_NONE = ("epochs", "steps", "clip", "average")


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the paper's flows.

    The length is given in epochs or in steps, and the schedule moves in the same unit: at the end
    of each epoch, or of each step. It spans the whole length, whenever a run is interrupted.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    epochs: int | None = None
    steps: int | None = None  #: batches; either epochs or steps
    batch_size: int = 32  #: of all processes together
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    amsgrad: bool = True
    weight_decay: float = 0.0  #: L2, as in ``torch.optim.Adam``
    schedule: Schedule = "cosine"  #: to 0, or times gamma at each milestone
    milestones: tuple[int, ...] = ()  #: in epochs or steps; none: a constant learning rate
    gamma: float = 0.1
    flip: bool = False  #: mirror every other image
    crop: int = 0  #: pad by so many zeros, and cut out at random
    replaced: float = (
        0.0  #: share of values replaced at random, for a likelihood ratio's background
    )
    clip: float | None = None  #: largest norm of the gradient
    average: float | None = None  #: decay of an exponential moving average of the weights
    autocast: bool = False  #: bfloat16 where torch.autocast sees fit
    recompute: bool = False  #: compute hidden layers again in the backward pass, to save memory
    graph: bool = True  #: on a GPU, capture a step in a CUDA graph; it changes no result
    validation: int = 0  #: training images that are held out to choose the best checkpoint
    seed: int = 0  #: of initial values, order, augmentation and noise

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"one of epochs and steps must be given, got {self.epochs} and {self.steps}"
            )
        for name, least in (
            ("epochs", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("crop", 0),
            ("validation", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                self._store(name, check_integer(name, value, least))
        for name in ("amsgrad", "flip", "autocast", "recompute", "graph"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in (
            "learning_rate",
            "eps",
            "weight_decay",
            "gamma",
            "clip",
            "average",
            "replaced",
        ):
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                self._store(name, check_number(name, value))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}")
        self._store("betas", tuple(check_number("betas", beta) for beta in self.betas))
        places = tuple(check_integer("milestones", place, least=1) for place in self.milestones)
        self._store("milestones", places)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average must be at least 0 and below 1, got {self.average}")
        if not 0 <= self.replaced <= 1:
            raise ValueError(f"replaced must be from 0 to 1, got {self.replaced}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be 'cosine' or 'milestones', got {self.schedule!r}")

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a recipe is frozen, and written as JSON


@dataclass(frozen=True)
class Experiment:
    """A preset, as changed: the data it is for, the model's arguments, and the recipe."""

    task: str  #: "density" or "classify"
    data: dict[str, Any]  #: channels, image_size, levels, logit_lambda, and mean and std
    model: dict[str, Any]  #: arguments of MintNet or MintClassifier
    recipe: Recipe
    condition: bool = False  #: whether a density is to be one for each class

    def for_classes(self, classes: int) -> "Experiment":
        """The same, with labels of so many classes as the context, if that is what it is about."""
        if not self.condition:
            return self
        data, model = {**self.data, "classes": classes}, {**self.model, "context": classes}
        return replace(self, data=data, model=model)


def read_experiment(preset: str, task: str, changes: Mapping[str, Any] | None = None) -> Experiment:
    """What a preset says of a task.

    Args:
        preset: its name, as in ``mintnet_triton.presets``.
        task: "density" or "classify".
        changes: values to take instead of the preset's, by the name of a field of :class:`Recipe`,
            of an argument of the model, or of an entry of the preset's data; and ``condition``,
            true for a density for each class.

    Raises:
        ValueError: no such preset or task, a name that nothing has, or a value outside its range.
        TypeError: a value of the wrong type.
    """
    if task not in SECTIONS:
        raise ValueError(f"task must be 'density' or 'classify', got {task!r}")
    section, training = SECTIONS[task]
    data, model = load_preset(preset, "data"), model_arguments(preset, section)
    recipe = load_preset(preset, training)
    recipe_names = {field.name for field in fields(Recipe)}
    model_names = {*model, "order", "kernel_size", "activation"}
    model_names |= {"zero_init_start", *Parts.__annotations__} if task == "density" else {"width"}
    data_names = set(data) - {"channels", "image_size"}
    condition = False
    for name, value in (changes or {}).items():
        if name in recipe_names:
            if name in ("epochs", "steps"):
                recipe = {k: v for k, v in recipe.items() if k not in ("epochs", "steps")}
            recipe[name] = value
        elif name == "condition" and task == "density":
            if not isinstance(value, bool):
                raise TypeError(f"condition must be true or false, got {value!r}")
            condition = value
        elif name in data_names:
            data[name] = value
        elif name in model_names:
            model[name] = value
        else:
            others = {"condition"} if task == "density" else set[str]()
            known = sorted(recipe_names | data_names | model_names | others)
            raise ValueError(f"nothing is called {name!r}; there are {', '.join(known)}")
    for name in ("betas", "milestones"):
        if isinstance(recipe.get(name), Sequence):
            recipe[name] = tuple(recipe[name])
    return Experiment(task, data, model, Recipe(**recipe), condition)


def parse_change(text: str) -> tuple[str, Any]:
    """``"name=value"`` -> the name and the value, read as TOML, or else as a bare word.

    Raises:
        ValueError: there is no "=", or no name.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"expected name=value, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
