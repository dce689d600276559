"""What other people bring along: changed networks, and files of others."""

import copy
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import mintnet_triton as mint
from mintnet_triton.recipes import commands
from mintnet_triton.recipes.objectives import Density
from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.runs import RunError, RunFolder
from mintnet_triton.recipes.training import train
from tests import golden
from tests.tiny_run import random_data


def flow() -> mint.MintNet:
    return mint.MintNet(2, 4, 2, 4, squeezes=1)


def classifier() -> mint.MintClassifier:
    return mint.MintClassifier(3, 8, 10, pairs=2, squeezes=1, width=4)


def child(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def untrained_head(model: Any) -> None:
    model.fc = nn.Linear(4 * 4, 5)


def other_eps(model: Any) -> None:
    model.layers[0][0].eps = 1e-3


def other_momentum(model: Any) -> None:
    model.layers[0][0] = nn.BatchNorm2d(4, momentum=0.5)


def no_statistics(model: Any) -> None:
    model.layers[0][0] = nn.BatchNorm2d(4, track_running_stats=False)


def tied_norms(model: Any) -> None:
    model.layers[0][2] = model.layers[0][0]


def no_head(model: Any) -> None:
    model.fc = nn.Identity()


def quantised_head(model: Any) -> None:
    scaled = torch.quantize_per_tensor(model.fc.weight.detach(), 0.1, 0, torch.qint8)
    model.fc.weight = nn.Parameter(scaled, requires_grad=False)


def sparse_head(model: Any) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach().to_sparse())


class Tagged(torch.Tensor):
    """A tensor that means something by itself."""


def tagged_head(model: Any) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(Tagged))


def pruned(model: Any) -> None:
    prune.l1_unstructured(child(model, "layers.0.1").conv1, "weight", amount=0.5)


def parametrised(model: Any) -> None:
    parametrizations.weight_norm(child(model, "layers.0.1").conv2)


def another_activation(model: Any) -> None:
    layer = child(model, "layers.0.1")
    layer.activation = mint.MintLayer(1, 1, 1, activation="tanh").activation


def activation_of_the_same_name(model: Any) -> None:
    layer = child(model, "layers.0.1")
    name = layer.activation.name
    layer.activation = mint.Activation(
        name, torch.tanh, lambda a: torch.cosh(a) ** -2, slope=lambda h: 1 - h**2
    )


def another_order(model: Any) -> None:
    child(model, "layers.0.1").ordering = mint.Ordering("pixel", "upper")


def tied(model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, mint.MintLayer)]
    layers[1].conv1.weight = layers[0].conv1.weight


def half_tied(model: Any) -> None:
    layer = child(model, "layers.0.1")
    both = torch.zeros(layer.t.numel() + 1)
    layer.t = nn.Parameter(both[1:].view_as(layer.t))
    layer.conv3.bias = nn.Parameter(both[: layer.channels])


class Doubled(mint.MintLayer):
    """All that is stored of it is as in a Mint layer."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(2 * x)


def another_kind(model: Any) -> None:
    layer = child(model, "layers.0.1")
    twin = Doubled(
        layer.channels,
        layer.size,
        layer.hidden,
        layer.ordering.triangle,
        activation=layer.activation,
    )
    model.layers[0][1] = twin


def of_another_shape(model: Any) -> None:
    layer = child(model, "layers.0.1")
    layer.t = nn.Parameter(torch.ones(layer.channels, 1, 1))  # broadcasts


def another_buffer(model: Any) -> None:
    model.register_buffer("scale", torch.ones(1), persistent=False)


def another_parameter(model: Any) -> None:
    child(model, "layers.0.1").scale = nn.Parameter(torch.ones(1))


def another_module(model: Any) -> None:
    model.extra = nn.Identity()


def a_method_of_its_own(model: Any) -> None:
    model.forward = lambda x: x


def on_no_device(model: Any) -> None:
    model.to("meta")


def of_complex_numbers(model: Any) -> None:
    layer = child(model, "layers.0.1")
    layer.t = nn.Parameter(layer.t.detach().to(torch.complex64))


def of_other_arguments(model: Any) -> None:
    model.arguments["kernel_size"] = (3, 5, 3)


ANY = [pruned, parametrised, another_activation, activation_of_the_same_name]
ANY += [
    another_kind,
    of_another_shape,
    another_order,
    tied,
    half_tied,
    another_buffer,
    another_parameter,
    another_module,
]
ANY += [a_method_of_its_own, on_no_device, of_complex_numbers, of_other_arguments]
OF_CLASSIFIERS = [untrained_head, other_eps, other_momentum, no_statistics, tied_norms, no_head]
OF_CLASSIFIERS += [quantised_head, sparse_head, tagged_head]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("make", "change"),
    [(make, change) for make in (flow, classifier) for change in ANY]
    + [(classifier, change) for change in OF_CLASSIFIERS],
)
def test_what_would_not_come_back_is_refused(make: Any, change: Any, tmp_path: Path) -> None:
    model = make()
    path = tmp_path / "model.safetensors"
    mint.save(model, path)
    before = path.read_bytes()
    change(model)
    state = torch.get_rng_state()
    with pytest.raises(mint.CheckpointError, match=r"would not be read back: .*'.*'") as refused:
        mint.save(model, path)
    named = re.findall(r"'([\w.]+)'", str(refused.value))
    assert any(name.split(".")[0] in (*NAMES, "the model") for name in named), refused.value
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(torch.get_rng_state(), state)


NAMES = ("layers", "fc", "scale", "extra", "forward")


def eager_halves(model: Any) -> None:
    model.half()
    child(model, "layers.1").double()


def channels_last(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


def strided(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.stack([parameter.data, parameter.data], -1)[..., 1]


def of_one_vector(model: Any) -> None:
    parameters = list(model.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)


def watched(model: Any) -> None:
    model.register_forward_hook(lambda *_: None)
    model.layers[0].register_full_backward_hook(lambda *_: None)


def compiled(model: Any) -> None:
    model.compile(backend="eager")
    model.forward = torch.compile(model.forward, backend="eager")


def not_finite(model: Any) -> None:
    child(model, "layers.0.1").t.data[0, 0, 0] = torch.nan


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def from_nowhere(model: Any) -> Any:
    with torch.device("meta"):
        again = type(model)(**model.arguments)
    again.load_state_dict(model.state_dict(), assign=True)
    return again


FINE = [eager_halves, channels_last, strided, of_one_vector, watched, compiled, not_finite, copied]
FINE += [pickled, from_nowhere]
FINE += [lambda model: model.eval(), lambda model: model.requires_grad_(False)]
FINE += [lambda model: model.bfloat16(), lambda model: setattr(model, "note", "mine")]


@pytest.mark.parametrize("make", [flow, classifier])
@pytest.mark.parametrize("change", FINE)
def test_what_is_the_same_function_is_saved(make: Any, change: Any, tmp_path: Path) -> None:
    model = make()
    model = change(model) or model
    path = tmp_path / "model.safetensors"
    mint.save(model, path)
    state = torch.get_rng_state()
    again = mint.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    theirs, ours = model.state_dict(), again.state_dict()
    assert list(theirs) == list(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in again.parameters())


def test_a_network_without_values_is_refused(tmp_path: Path) -> None:
    message = r"'layers\.0\.0\.t' has no values, for it is on the meta device"
    with pytest.raises(mint.CheckpointError, match=message):
        mint.save(flow().to("meta"), tmp_path / "model")


def test_what_was_read_computes_the_same(tmp_path: Path) -> None:
    for model, shape in ((flow(), (2, 2, 4, 4)), (classifier().eval(), (2, 3, 8, 8))):
        with mint.frozen(model):
            mint.save(model, tmp_path / "model")
        again = mint.load(tmp_path / "model").train(model.training)
        x = torch.randn(shape)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        (again.double()(x.double())[0]).sum().backward()
        assert all(parameter.grad is not None for parameter in again.parameters())


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    own = type("MintNet", (mint.MintNet,), {})
    model: Any
    for model in (
        own(2, 4, 1, 4, 0),
        torch.compile(flow(), backend="eager"),
        nn.DataParallel(flow()),
    ):
        with pytest.raises(TypeError, match="model must be one of"):
            mint.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_parts_of_weights_are_refused(tmp_path: Path) -> None:
    """Sharded by FSDP, in a process of its own."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh, model = init_device_mesh("cpu", (1,)), classifier()
        weight = distribute_tensor(model.fc.weight.detach(), mesh, [Replicate()])
        model.fc.weight = nn.Parameter(weight)
        with pytest.raises(mint.CheckpointError, match=r"'fc\.weight' is a DTensor"):
            mint.save(model, tmp_path / "model")
    finally:
        distributed.destroy_process_group()


def test_paths(tmp_path: Path) -> None:
    class Somewhere:
        def __fspath__(self) -> str:
            return str(tmp_path / "some.where")

    path: Any
    functions: list[Any] = [lambda path: mint.save(flow(), path), mint.load]
    for path in (Somewhere(), os.fsencode(tmp_path / "bytes"), str(tmp_path / "text")):
        mint.save(flow(), path)
        assert isinstance(mint.load(path), mint.MintNet)
        with pytest.raises(mint.CheckpointError, match="not a whole PyTorch checkpoint"):
            mint.load_authors_checkpoint(path)
    assert len(list(tmp_path.iterdir())) == 3
    for function in functions:
        with pytest.raises(IsADirectoryError, match="path must be that of a file, got the folder"):
            function(tmp_path)
        with pytest.raises(TypeError, match="expected str, bytes"):
            function(3)
    with pytest.raises(OSError, match="cannot write"):
        mint.save(flow(), tmp_path / "none" / "model")
    with pytest.raises(OSError, match=r"cannot write|Not a directory"):
        mint.save(flow(), tmp_path / "text" / "model")
    with pytest.raises(FileNotFoundError):
        mint.load(tmp_path / "none")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    mint.save(flow(), path)
    before = path.read_bytes()

    def fill(state: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"some")
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fill)
    with pytest.raises(OSError, match="no space left"):
        mint.save(flow(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_other_networks(tmp_path: Path) -> None:
    model, path = flow(), tmp_path / "model"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}

    def written(**changes: Any) -> None:
        description = {"class": "MintNet", "arguments": {**model.arguments, **changes}}
        metadata = {"mintnet_triton": json.dumps(description)}
        safetensors.torch.save_file(state, path, metadata=metadata)

    for changes in ({"later": 1}, {"activation": "gelu"}, {"pairs": "2"}, {"hidden": 0}):
        written(**changes)
        with pytest.raises(mint.CheckpointError, match=f"{path}: does not describe a network"):
            mint.load(path)
    for changes in ({"pairs": 3}, {"kernel_size": 5}, {"hidden": 10**7}):  # 10**15 weights
        written(**changes)
        with pytest.raises(mint.CheckpointError, match=f"{path}: Error.* in loading state_dict"):
            mint.load(path)
    state["layers.0.0.t"] = state["layers.0.0.t"].long()
    written()
    with pytest.raises(mint.CheckpointError, match=r"layers\.0\.0\.t"):
        mint.load(path)


def test_authors_files_of_several_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "mixed.pth"
    content = torch.load(golden.DATA / "authors_checkpoint_c3_s8.pth", weights_only=True)
    whole = content[0]
    for dtype in (torch.float64, torch.int64):
        name = "module.layers.0.0.bias1"
        content[0] = {**whole, name: whole[name].to(dtype)}
        torch.save(content, path)
        with pytest.raises(mint.CheckpointError, match=f"bias must be torch.float32.*got {dtype}"):
            mint.load_authors_checkpoint(path)


@pytest.mark.parametrize("content", [{}, [], {"model": {}, "step": 1}, {"model": 3, "step": 1}])
def test_checkpoints_of_other_runs(content: Any, tmp_path: Path) -> None:
    def run(resume: bool) -> None:
        model = mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0)
        recipe = Recipe(steps=1, batch_size=4)
        description = {"model": model.arguments}
        train(model, random_data(), Density(17), recipe, tmp_path, description, resume=resume)

    run(resume=False)
    last = RunFolder(tmp_path).checkpoints()[-1]
    torch.save(content, last)
    with pytest.raises(mint.CheckpointError, match=f"{last}: "):
        run(resume=True)
    with pytest.raises(mint.CheckpointError, match=f"{last}: "):
        commands.load_run(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunError, match="run"):
            commands.load_run(tmp_path)
