from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mintnet_triton as mint
from tests import golden

AUTHORS = golden.DATA / "authors_checkpoint_c3_s8.pth"


def authors_list() -> list[Any]:
    content = torch.load(AUTHORS, weights_only=True)
    assert isinstance(content, list)
    return content


def test_the_authors_file() -> None:
    flow = mint.load_authors_checkpoint(AUTHORS)
    assert isinstance(flow, mint.MintNet)
    assert flow.arguments == {
        "channels": 3,
        "image_size": (8, 8),
        "pairs": 3,
        "hidden": 8,
        "squeezes": 1,
        "order": "channel",
        "kernel_size": (3, 3, 3),
        "activation": "elu",
        "zero_init_start": None,
    }
    values = golden.arrays("authors_checkpoint_c3_s8_expected.npz")
    z, log_det = flow(values["x"])
    golden.assert_golden(z, values["z"], 1e-4)
    golden.assert_golden(log_det, values["log_det"], 1e-5)


def test_masks_may_be_absent() -> None:
    flow = mint.load_authors_checkpoint(golden.DATA / "mnist5k_checkpoint.pth")
    assert isinstance(flow, mint.MintNet)
    assert (flow.arguments["pairs"], flow.arguments["squeezes"]) == (12, 1)
    assert flow.arguments["order"] == "channel"


def test_legacy_format_of_torch_1_1(tmp_path: Path) -> None:
    legacy = tmp_path / "legacy.pth"
    torch.save(authors_list(), legacy, _use_new_zipfile_serialization=False)
    assert legacy.read_bytes()[:2] != b"PK"
    one, other = mint.load_authors_checkpoint(AUTHORS), mint.load_authors_checkpoint(legacy)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_moving_averages(prefix: str, tmp_path: Path) -> None:
    content = authors_list()
    averages = {
        prefix + name.removeprefix("module."): tensor + 1
        for name, tensor in content[0].items()
        if "mask" not in name
    }
    path = tmp_path / "ema.pth"
    torch.save([*content, averages], path)
    raw, averaged = (mint.load_authors_checkpoint(path, ema=ema) for ema in (False, True))
    automatic = mint.load_authors_checkpoint(path)
    for one, two, three in zip(
        raw.parameters(), averaged.parameters(), automatic.parameters(), strict=True
    ):
        torch.testing.assert_close(one + 1, two)
        assert torch.equal(two, three)
    with pytest.raises(mint.CheckpointError, match="ema=True, but the file holds no moving"):
        mint.load_authors_checkpoint(AUTHORS, ema=True)
    torch.save([*content, {"strange": torch.ones(1)}], path)
    with pytest.raises(mint.CheckpointError, match=r"unknown parameters \['strange'\]"):
        mint.load_authors_checkpoint(path)


def test_order_is_read_off_the_masks(tmp_path: Path) -> None:
    with pytest.raises(mint.CheckpointError, match=r"mask1 fits no 'pixel' order"):
        mint.load_authors_checkpoint(AUTHORS, order="pixel")
    content = authors_list()
    for name in content[0]:
        block = name.removeprefix("module.").split(".")
        if "mask" not in name or "center" in name:
            continue
        colours = 3 if block[1] == "0" else 12
        hidden = 24 // colours
        mask = mint.Ordering("pixel", "lower" if block[2] == "0" else "upper").conv_mask(colours, 3)
        tiles = {"mask1": (hidden, 1), "mask2": (hidden, hidden), "mask3": (1, hidden)}[block[3]]
        content[0][name] = mask.repeat(*tiles, 1, 1).float()
    path = tmp_path / "pixel.pth"
    torch.save(content, path)
    assert mint.load_authors_checkpoint(path).arguments["order"] == "pixel"
    content[0]["module.layers.2.0.mask2"][0, 0, 0, 0] = 0
    torch.save(content, path)
    with pytest.raises(mint.CheckpointError, match=r"layers\.2\.0\.mask2 fits no known order"):
        mint.load_authors_checkpoint(path)


def test_an_order_can_be_given_where_no_masks_decide(tmp_path: Path) -> None:
    path = tmp_path / "flow.pth"
    golden.network_file("flow_c3_s8.npz", path)
    assert mint.load_authors_checkpoint(path).arguments["order"] == "channel"
    assert mint.load_authors_checkpoint(path, order="pixel").arguments["order"] == "pixel"


@pytest.mark.parametrize("keep", [0, 1, 100, 100_000, -1])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files(keep: int, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(authors_list(), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(mint.CheckpointError, match="not a whole PyTorch checkpoint"):
        mint.load_authors_checkpoint(path)


class NotData:
    """Something that unpickling would have to execute."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "expected the authors' list"),
        ([1, 2, 3, 4], "expected the authors' list"),
        ([{"weight": torch.ones(1)}, {}], "expected the authors' list"),
        ([{"weight": torch.ones(1)}, {}, 1, 2], "not a MintNet"),
        ([{"layers.0.0.weight1": torch.ones(1)}, {}, 1, 2], "a Mint layer lacks"),
        ([NotData(), {}, 1, 2], "not a whole PyTorch checkpoint"),
    ],
)
def test_foreign_files(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(content, path)
    with pytest.raises(mint.CheckpointError, match=message):
        mint.load_authors_checkpoint(path)


def test_a_text_file_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "text.pth"
    path.write_text("not a checkpoint\n")
    with pytest.raises(mint.CheckpointError, match="not a whole PyTorch checkpoint"):
        mint.load_authors_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        mint.load_authors_checkpoint(tmp_path / "missing.pth")


def test_a_file_with_a_block_or_shape_amiss(tmp_path: Path) -> None:
    path = tmp_path / "amiss.pth"
    content = authors_list()
    whole = content[0]
    content[0] = {name: tensor for name, tensor in whole.items() if ".layers.2." not in name}
    torch.save(content, path)
    with pytest.raises(mint.CheckpointError):
        mint.load_authors_checkpoint(path)
    content[0] = {**whole, "module.layers.3.0.bias2": torch.zeros(5)}
    torch.save(content, path)
    with pytest.raises(mint.CheckpointError, match="do not fit 12 colours of 2 units"):
        mint.load_authors_checkpoint(path)
    for name in ("extra", "extra.weight", "layers.0.0.weight4", "layers.0.2.weight"):
        content[0] = {**whole, f"module.{name}": torch.zeros(5)}
        torch.save(content, path)
        with pytest.raises(mint.CheckpointError, match=name):
            mint.load_authors_checkpoint(path)
    for damaged in (torch.tensor(1.0), torch.zeros(0, 3, 3, 3), torch.ones(24, 3, 3, 3).int()):
        content[0] = {**whole, "module.layers.0.0.weight1": damaged}
        torch.save(content, path)
        with pytest.raises(mint.CheckpointError, match="not those of a Mint layer"):
            mint.load_authors_checkpoint(path)


def test_kernels_of_three_sizes() -> None:
    layer = mint.MintLayer(2, 4, 3, kernel_size=(3, 5, 1))

    def latent_major(tensor: torch.Tensor, *dimensions: int) -> torch.Tensor:
        for dim in dimensions:
            index = torch.arange(6).view(2, 3).T.flatten()
            tensor = tensor.index_select(dim, index)
        return tensor.detach()

    state = {
        "weight1": latent_major(layer.conv1.weight, 0),
        "bias1": latent_major(layer.get_parameter("conv1.bias"), 0),
        "weight2": latent_major(layer.conv2.weight, 0, 1),
        "bias2": latent_major(layer.get_parameter("conv2.bias"), 0),
        "weight3": latent_major(layer.conv3.weight, 1),
        "bias3": layer.get_parameter("conv3.bias").detach(),
        "t": layer.t.detach()[None],
    }
    again = mint.layer_from_authors(state, "lower")
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(again(x)[0], layer(x)[0])


def test_layer_from_authors() -> None:
    values = golden.arrays("layer_c3_k4_B_pixel.npz")
    state = {
        key.removeprefix("param."): value.numpy()
        for key, value in values.items()
        if key.startswith("param.")
    }
    layer = mint.layer_from_authors(state, triangle="upper", order="pixel")
    assert layer.t.dtype == torch.float64
    golden.assert_golden(layer(values["x"])[0], values["y"])
    del state["bias2"]
    with pytest.raises(mint.CheckpointError, match=r"lacks \['bias2'\]"):
        mint.layer_from_authors(state, triangle="upper", order="pixel")
    state["bias2"] = values["param.bias1"][:3].numpy()
    with pytest.raises(mint.CheckpointError):
        mint.layer_from_authors(state, triangle="upper", order="pixel")


MODELS: dict[str, Callable[[], mint.MintNet | mint.MintClassifier]] = {
    "flow": lambda: mint.MintNet(
        3, (4, 8), 2, 4, 1, order="pixel", kernel_size=(3, 1, 5), activation="tanh"
    ),
    "classifier": lambda: mint.MintClassifier(1, 8, classes=3, pairs=2, squeezes=1, width=4),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[name]().to(dtype)
    path = tmp_path / "model.safetensors"
    mint.save(model, path)
    again = mint.load(path)
    assert type(again) is type(model)
    assert {**again.arguments, "image_size": ()} == {
        **model.arguments,
        "image_size": (),
        "kernel_size": again.arguments["kernel_size"],
    }
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert again.state_dict()[key].dtype == value.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_load_refuses_what_is_not_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    mint.save(mint.MintNet(1, 4, 1, 2, 0), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:-8], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(mint.CheckpointError, match="not a whole safetensors file"):
            mint.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(mint.CheckpointError, match="not of a network of this library"):
        mint.load(path)
    for metadata in (
        "no json",
        "[]",
        '{"class": "MintNet"}',
        '{"class": "Other", "arguments": {}}',
    ):
        save_file({"weight": torch.ones(2)}, path, metadata={"mintnet_triton": metadata})
        with pytest.raises(mint.CheckpointError, match="does not describe a network"):
            mint.load(path)
    with pytest.raises(OSError, match="cannot write"):
        mint.save(mint.MintNet(1, 4, 1, 2, 0), tmp_path / "missing" / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        mint.load(tmp_path / "missing.safetensors")


def test_save_refuses_what_it_cannot_describe(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be one of .* got Linear"):
        mint.save(torch.nn.Linear(2, 2), tmp_path / "x")  # type: ignore[arg-type]
    own = mint.Activation(
        "own", torch.tanh, lambda a: torch.cosh(a) ** -2, slope=lambda h: 1 - h**2
    )
    with pytest.raises(TypeError, match="given as an Activation cannot be saved"):
        mint.save(mint.MintNet(1, 4, 1, 2, 0, activation=own), tmp_path / "x")


def conditional_flow(**arguments: Any) -> mint.MintNet:
    torch.manual_seed(0)
    flow = mint.MintNet(1, 8, pairs=2, hidden=4, squeezes=1, context=3, **arguments).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


class Fourier(nn.Module):
    """Has state that no state dict has."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.register_buffer("waves", torch.arange(1.0, 3).double(), persistent=False)
        self.last = nn.Linear(6, outputs)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.waves, torch.Tensor)
        values: torch.Tensor = self.last((context[:, :, None] * self.waves).sin().flatten(1))
        return values


def test_conditional_flows(tmp_path: Path) -> None:
    x, context = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 3).double()
    for made in (None, Fourier, lambda outputs: nn.Linear(3, outputs)):
        flow, path = conditional_flow(context_network=made), tmp_path / "flow.safetensors"
        mint.save(flow, path)
        again = mint.load(path, context_network=made)
        assert isinstance(again, mint.MintNet)
        assert again.arguments == flow.arguments
        for ours, theirs in zip(again(x, context), flow(x, context), strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(again.inverse(again(x, context)[0], context=context)[0], x)


def test_context_networks_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    mint.save(conditional_flow(context_network=Fourier), path)
    with pytest.raises(mint.CheckpointError, match=r"load\(path, context_network=...\) needs"):
        mint.load(path)
    with pytest.raises(mint.CheckpointError, match="Missing key"):
        mint.load(path, context_network=lambda outputs: nn.Linear(3, outputs))
    with pytest.raises(TypeError, match="context_network must be a function of the number"):
        mint.load(path, context_network=nn.Linear(3, 4))
    mint.save(conditional_flow(), path)
    with pytest.raises(mint.CheckpointError, match="made without a context_network"):
        mint.load(path, context_network=Fourier)
    flow = conditional_flow()
    layer = flow.get_submodule("layers.0.0")
    assert isinstance(layer, mint.MintLayer)
    layer.context_network = Fourier(2 * 4 + 2).double()
    with pytest.raises(mint.CheckpointError, match=r"'layers.0.0.context_network' is of the type"):
        mint.save(flow, path)
