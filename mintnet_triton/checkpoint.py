"""Reading and writing networks: the authors' published files, and our own."""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mintnet_triton.classifier import MintClassifier
from mintnet_triton.context import check_maker
from mintnet_triton.flow import MintNet, squeeze_positions
from mintnet_triton.kernels import Activation
from mintnet_triton.mint import MintLayer
from mintnet_triton.ordering import Order, Ordering, Triangle
from mintnet_triton.untold import untold

_LAYER_TENSORS = ("weight1", "bias1", "weight2", "bias2", "weight3", "bias3", "t")
_MASKS = tuple(f"{kind}{i}" for kind in ("mask", "center_mask") for i in (1, 2, 3))
_TRIANGLES: tuple[Triangle, Triangle] = ("lower", "upper")
_CLASSES: dict[str, type[MintNet] | type[MintClassifier]] = {
    "MintNet": MintNet,
    "MintClassifier": MintClassifier,
}
_METADATA_KEY = "mintnet_triton"


class CheckpointError(ValueError):
    """A file is damaged or not of the expected kind, or cannot hold what a network has become."""


def layer_from_authors(
    state: Mapping[str, Any],
    triangle: Triangle,
    order: Order = "channel",
    activation: str | Activation = "elu",
) -> MintLayer:
    """One Mint layer from a layer's tensors in the authors' layout.

    Args:
        state: "weight1" (K*C, C, k, k), "bias1" (K*C,), "weight2" (K*C, K*C, k, k), "bias2",
            "weight3" (C, K*C, k, k), "bias3" (C,), "t" (1, C, H, W), as tensors or arrays, hidden
            units latent-major (``k * C + c``); all of one floating dtype, which the layer takes.
        triangle: "lower" for their type A, "upper" for B.
        order: "channel" where their ``rgb_last`` is true, else "pixel".
        activation: "elu" in their flows, "leaky_relu" in their classifiers.

    Raises:
        CheckpointError: a tensor is missing or does not fit the others.
    """
    tensors = _layer_tensors(state, "")
    colours, hidden, sizes, image = _layer_shape(tensors, "")
    layer = MintLayer(
        colours, image, hidden, triangle, order, kernel_size=sizes, activation=activation
    ).to(tensors["weight1"])
    _load_strictly(layer, _our_layer(tensors, colours, hidden))
    return layer


def load_authors_checkpoint(
    path: str | os.PathLike[str],
    order: Order | None = None,
    ema: bool | Literal["auto"] = "auto",
) -> MintNet | MintClassifier:
    """A network from a file that the authors' training script wrote, on the CPU.

    The file is a list: network, optimiser, epoch, step, and for flows scheduler and perhaps moving
    averages. It is read with ``weights_only=True``, so that nothing in it is executed.

    Args:
        path: of the file.
        order: order of the variables; None reads it off the masks in the file, and takes "channel"
            (all published models) if there are none.
        ema: use the moving averages of the weights; "auto" where the file has them.

    Returns:
        A :class:`MintNet`, or a :class:`MintClassifier` in evaluation mode for a classifier's file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, not theirs, or contradicts ``order`` or ``ema``.
    """
    network, averages = _read_authors_list(Path(os.fsdecode(path)))
    if ema is True and averages is None:
        raise CheckpointError(f"{path}: ema=True, but the file holds no moving averages")
    if ema is not False and averages is not None:
        unknown = sorted(set(averages) - set(network))
        if unknown:
            raise CheckpointError(f"{path}: moving averages of unknown parameters {unknown[:3]}")
        network = {**network, **averages}
    classifier = "fc.weight" in network
    blocks = _blocks(network, path)
    steps = ("1", "3") if classifier else ("0", "1")
    layers: dict[str, dict[str, Tensor]] = {}
    for block in blocks:
        for step in steps:
            prefix = f"layers.{block}.{step}."
            layers[prefix] = _layer_tensors(network, prefix)
    order = _order_of(network, layers, steps, order, path)

    first_colours, first_hidden, sizes, image = _layer_shape(*_first(layers))
    squeezes = blocks[-1] + 1 - len(blocks)
    arguments: dict[str, Any] = {
        "image_size": image,
        "pairs": len(blocks),
        "hidden": first_hidden,
        "squeezes": squeezes,
        "order": order,
        "kernel_size": sizes,
    }
    _check_squeezes(blocks, squeezes, path)
    model: MintNet | MintClassifier
    try:
        if classifier:
            classes = len(network["fc.weight"])
            model = MintClassifier(channels=None, classes=classes, width=first_colours, **arguments)
        else:
            model = MintNet(channels=first_colours, **arguments)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error

    theirs = {prefix + name for prefix in layers for name in (*_LAYER_TENSORS, *_MASKS)}
    ours: dict[str, Tensor] = {
        name: tensor for name, tensor in network.items() if name not in theirs
    }
    for prefix, tensors in layers.items():
        colours, hidden, _, _ = _layer_shape(tensors, prefix)
        for name, tensor in _our_layer(tensors, colours, hidden).items():
            ours[prefix + name] = tensor
    _load_strictly(model.to(_first(layers)[0]["weight1"].dtype), ours, path)
    return model.eval() if classifier else model


def save(model: MintNet | MintClassifier, path: str | os.PathLike[str]) -> None:
    """Write a network to a safetensors file: its state dict and its constructor's arguments.

    What :func:`load` would not read back as the same function is refused before anything is
    written. Modes, hooks, ``requires_grad`` and what is compiled are not kept. The file appears
    whole or not at all. Needs the package ``safetensors``.

    Of context networks that a function of the user's has made, the tensors alone are in the file:
    :func:`load` then needs that function.

    Raises:
        TypeError: another kind of model, or one with an activation that has no name.
        CheckpointError: names the module or the tensor that the constructor's arguments and a state
            dict do not tell all of: replaced, parametrised, pruned, tied, divided among processes.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if type(model) not in _CLASSES.values():
        raise TypeError(f"model must be one of {sorted(_CLASSES)}, got {type(model).__name__}")
    if not isinstance(model.arguments["activation"], str):
        raise TypeError("a network whose activation was given as an Activation cannot be saved")
    description = json.dumps({"class": type(model).__name__, "arguments": model.arguments})
    networks = _networks_of(model) if "context_network" in model.arguments else None
    if difference := untold(model, _described(description, networks)):
        raise CheckpointError(f"the {type(model).__name__} would not be read back: {difference}")
    path = Path(os.fsdecode(path))
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}")
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            partial,
            metadata={_METADATA_KEY: description},
        )
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {partial}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], context_network: Callable[[int], nn.Module] | None = None
) -> MintNet | MintClassifier:
    """Read a network that :func:`save` wrote, on the CPU.

    Args:
        path: of the file.
        context_network: what the network was made with, if it was: the file has the tensors of
            these networks, and nothing else of them.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        TypeError: context_network is no function that makes networks, but one itself.
        CheckpointError: the file is damaged or not ours, or context_network is missing, superfluous
            or does not make networks of the tensors in the file.
    """
    from safetensors import SafetensorError, safe_open

    check_maker(context_network)
    path = Path(os.fsdecode(path))
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}")
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(_METADATA_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    if description is None:
        raise CheckpointError(f"{path}: a safetensors file, but not of a network of this library")
    try:
        model = _described(description, context_network)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a network: {error!r}") from error
    _load_strictly(model, state, path, assign=True)  # with the dtypes of the file
    return model


def _described(
    description: str, context_network: Callable[[int], nn.Module] | None
) -> MintNet | MintClassifier:
    """The network on the meta device, which takes neither memory nor random numbers.

    Raises:
        CheckpointError: context_network is missing or superfluous.
    """
    parsed = json.loads(description)
    kind, arguments = _CLASSES[parsed["class"]], parsed["arguments"]
    own = arguments.pop("context_network", False)
    if own and context_network is None:
        raise CheckpointError(
            "its context networks were made by a function of the user's, and the file has their "
            "tensors alone: load(path, context_network=...) needs that function"
        )
    if context_network is not None and not own:
        raise CheckpointError("it was made without a context_network, but one was given")

    def on_cpu(outputs: int) -> nn.Module:  # a network of the user's may hold more than its state
        assert context_network is not None
        with torch.device("cpu"):
            return context_network(outputs)

    if own:
        arguments["context_network"] = on_cpu
    with torch.device("meta"):
        return kind(**arguments)


def _networks_of(model: nn.Module) -> Callable[[int], nn.Module]:
    """What gives the context networks of a model, one after the other."""
    layers = (layer for layer in model.modules() if isinstance(layer, MintLayer))
    networks = (layer.context_network for layer in layers)
    return lambda outputs: cast(nn.Module, next(networks))


def _read_authors_list(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The network's state dict, and the moving averages if any, without ``module.`` prefixes."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes make the reader raise has no common type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a whole PyTorch checkpoint: {reason}") from error
    if not isinstance(content, list) or len(content) < 4 or not _is_state(content[0]):
        raise CheckpointError(
            f"{path}: expected the authors' list [network, optimizer, epoch, step, ...], got "
            f"{type(content).__name__}"
        )
    averages = content[5] if len(content) > 5 and content[5] else None
    if averages is not None and not _is_state(averages):
        raise CheckpointError(f"{path}: the sixth entry holds no moving averages of parameters")
    return _without_prefix(content[0]), None if averages is None else _without_prefix(averages)


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _blocks(network: Mapping[str, Tensor], path: object) -> list[int]:
    """Indices of the blocks that have parameters; the others are squeezes."""
    matches = (re.match(r"layers\.(\d+)\.", name) for name in network)
    blocks = sorted({int(match[1]) for match in matches if match})
    if not blocks:
        raise CheckpointError(f"{path}: no parameters named layers.<n>, not a MintNet")
    return blocks


def _check_squeezes(blocks: list[int], squeezes: int, path: object) -> None:
    try:
        positions = squeeze_positions(len(blocks), squeezes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Every squeeze takes a number of its own.
    expected = [
        pair + sum(position <= pair for position in positions) for pair in range(len(blocks))
    ]
    if blocks != expected:
        missing = sorted(set(range(blocks[-1])) - set(blocks))
        raise CheckpointError(f"{path}: blocks {missing} are missing, at no place of a squeeze")


def _layer_tensors(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    missing = [prefix + name for name in _LAYER_TENSORS if prefix + name not in state]
    if missing:
        raise CheckpointError(f"a Mint layer lacks {missing}")
    return {name: torch.as_tensor(state[prefix + name]) for name in _LAYER_TENSORS}


def _layer_shape(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[int, int, tuple[int, int, int], tuple[int, int]]:
    """Colours, hidden units per colour, the three kernel sizes, and (H, W)."""
    weight1, weight3, t = tensors["weight1"], tensors["weight3"], tensors["t"]
    convolutions = (weight1, tensors["weight2"], weight3)
    if (
        any(tensor.ndim != 4 or not tensor.is_floating_point() for tensor in (*convolutions, t))
        or not weight1.numel()
        or weight1.shape[0] % weight1.shape[1]
    ):
        raise CheckpointError(
            f"{prefix or 'the layer'}: weight1 {tuple(weight1.shape)}, weight3 "
            f"{tuple(weight3.shape)} and t {tuple(t.shape)} are not those of a Mint layer"
        )
    colours = weight1.shape[1]
    sizes = (weight1.shape[-1], tensors["weight2"].shape[-1], weight3.shape[-1])
    return colours, weight1.shape[0] // colours, sizes, (t.shape[2], t.shape[3])


def _our_layer(tensors: Mapping[str, Tensor], colours: int, hidden: int) -> dict[str, Tensor]:
    """Their tensors under our names, hidden units from latent-major to colour-major."""

    def colour_major(tensor: Tensor, *dimensions: int) -> Tensor:
        for dimension in dimensions:
            shape = tensor.shape
            split = tensor.reshape(*shape[:dimension], hidden, colours, *shape[dimension + 1 :])
            tensor = split.transpose(dimension, dimension + 1).reshape(shape)
        return tensor

    try:
        return {
            "conv1.weight": colour_major(tensors["weight1"], 0),
            "conv1.bias": colour_major(tensors["bias1"], 0),
            "conv2.weight": colour_major(tensors["weight2"], 0, 1),
            "conv2.bias": colour_major(tensors["bias2"], 0),
            "conv3.weight": colour_major(tensors["weight3"], 1),
            "conv3.bias": tensors["bias3"],
            "t": tensors["t"].squeeze(0),
        }
    except RuntimeError as error:
        raise CheckpointError(
            f"the tensors of a Mint layer do not fit {colours} colours of {hidden} units: {error}"
        ) from error


def _order_of(
    network: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
    steps: tuple[str, str],
    order: Order | None,
    path: object,
) -> Order:
    """The order that the file's masks spell, which must be the one asked for, if any."""
    candidates: list[Order] = ["channel", "pixel"] if order is None else [order]
    for prefix, tensors in layers.items():
        triangle = _TRIANGLES[steps.index(prefix.split(".")[-2])]
        colours, hidden, sizes, _ = _layer_shape(tensors, prefix)
        for number, (size, tiles) in enumerate(
            zip(sizes, ((hidden, 1), (hidden, hidden), (1, hidden)), strict=True), start=1
        ):
            mask = network.get(f"{prefix}mask{number}")
            if mask is None:
                continue
            candidates = [
                candidate
                for candidate in candidates
                if torch.equal(
                    mask.bool(),
                    Ordering(candidate, triangle).conv_mask(colours, size).repeat(*tiles, 1, 1),
                )
            ]
            if not candidates:
                raise CheckpointError(
                    f"{path}: {prefix}mask{number} fits no "
                    f"{'known order' if order is None else f'{order!r} order'}"
                )
    return candidates[0]


def _first(layers: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
    prefix = next(iter(layers))
    return layers[prefix], prefix


def _load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: object = "state",
    assign: bool = False,
) -> None:
    own = {} if assign else module.state_dict()
    for name in own.keys() & state.keys():
        if own[name].dtype != state[name].dtype:
            raise CheckpointError(
                f"{path}: {name} must be {own[name].dtype}, as the others are, got "
                f"{state[name].dtype}"
            )
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error
