"""The package imports bare, and its sdist and wheel hold all it needs."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Everything but the standard library, torch and what torch needs, and numpy is hidden.
BARE_IMPORT = """
import sys
hidden = ["triton", "safetensors", "sklearn", "matplotlib", "mlxtend", "tqdm", "scipy", "pandas"]
for name in hidden:
    sys.modules[name] = None
import mintnet_triton as mint
import torch
layer = mint.MintLayer(1, 3, 2)
layer.inverse(layer(torch.randn(2, 1, 3, 3))[0].detach())
print(mint.__file__)
"""


def python(code: str, folder: Path, path: str = "") -> str:
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_from_a_bare_checkout() -> None:
    assert python(BARE_IMPORT, ROOT) == str(ROOT / "mintnet_triton" / "__init__.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist, and the wheel built from it, of a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(
        ROOT,
        folder / "source",
        symlinks=True,
        ignore=shutil.ignore_patterns(".venv", ".git", "out", "data", "results", ".*cache"),
    )
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    result = subprocess.run(
        [*command, str(folder / "source")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "dist"


def test_wheel_holds_real_kernels_and_imports(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    for needed in ("kernels/reference.py", "presets/mnist.toml", "py.typed", "recipes/demo.py"):
        assert f"mintnet_triton/{needed}" in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    where = python(BARE_IMPORT, tmp_path.parent, path=str(tmp_path))
    assert where == str(tmp_path / "mintnet_triton" / "__init__.py")
    code = "import mintnet_triton as mint; print(mint.MintNet.from_preset('mnist').latent_shape)"
    assert python(code, tmp_path.parent, path=str(tmp_path)) == "(16, 7, 7)"


def test_sdist_holds_real_kernels(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive if "/" in member.name}
    assert members["mintnet_triton/kernels/reference.py"].isfile()
    assert "LICENSE" in members
