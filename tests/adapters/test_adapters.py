"""What all adapters have in common: none is imported unasked, and a missing library is named."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.adapters import event_shapes, library, to_data, to_latent
from tests.adapters.flows import SHAPE, make_flow, samples

ROOT = Path(__file__).parent.parent.parent
#: adapter -> what it imports
LIBRARIES = {
    "freia": "FrEIA",
    "hub": "huggingface_hub",
    "nflows": "nflows",
    "normflows": "normflows",
    "pyro": "pyro",
    "sbi": "sbi",
    "torchflows": "torchflows",
    "zuko": "zuko",
}


def test_every_adapter_has_an_extra_and_a_test() -> None:
    folder = ROOT / "mintnet_triton" / "adapters"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert names == {*LIBRARIES, "torch_distributions"}
    assert all((Path(__file__).parent / f"test_{name}.py").exists() for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(LIBRARIES) <= set(extras)
    assert set(extras["adapters"][0].split("[")[1].rstrip("]").split(",")) == set(LIBRARIES)


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [one for one in sys.modules if one.split(".")[0] == LIBRARIES[name]]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    adapter = f"mintnet_triton.adapters.{name}"
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    message = rf"{LIBRARIES[name]} is not installed: pip install 'mintnet-triton\[{name}\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(adapter)


def test_what_a_library_lacks_itself_is_not_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere_to_be_found'"):
        library("half_there", "half")


def test_no_library_is_imported_unasked() -> None:
    program = f"""
import sys
import mintnet_triton
import mintnet_triton.adapters.torch_distributions
loaded = {{name.split(".")[0] for name in sys.modules}} & set({sorted(LIBRARIES.values())})
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_batches_of_any_shape() -> None:
    flow = make_flow()
    assert event_shapes(flow) == (SHAPE, (8, 2, 1))
    x = samples(2, 3)
    z, log_det = to_latent(flow, x)
    assert (z.shape, log_det.shape) == ((2, 3, 8, 2, 1), (2, 3))
    flat, flat_log_det = flow(x.flatten(0, 1))
    torch.testing.assert_close((z.flatten(0, 1), log_det.flatten()), (flat, flat_log_det))
    again, back = to_data(flow, z)
    torch.testing.assert_close((again, back), (x, -log_det))
    empty, none = to_latent(flow, samples(0, 3))
    assert (empty.shape, none.shape) == ((0, 3, 8, 2, 1), (0, 3))
    with pytest.raises(ValueError, match=r"z must have shape \(\.\.\., 8, 2, 1\), got \(2, 2, 4"):
        to_data(flow, samples(2))


def test_modules_of_torchs_around_a_flow() -> None:
    flow, x = make_flow(), samples(2)
    compiled = torch.compile(flow, backend="eager")
    assert isinstance(compiled, torch.nn.Module)
    z, log_det = to_latent(compiled, x)
    torch.testing.assert_close((z, log_det), flow(x))
    torch.testing.assert_close(to_data(compiled, z)[0], x)
    assert isinstance(flow, mint.MintNet)
