"""The package imports bare, and its sdist and wheel hold all it needs."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a checkout may lack: all that the project asks for beyond torch and numpy.
BARE_IMPORT = """
import sys
hidden = ["triton", "numba", "safetensors", "sklearn", "matplotlib", "mlxtend", "tqdm", "scipy"]
for name in [*hidden, "pandas"]:
    sys.modules[name] = None
import mintnet_triton as mint
import torch
layer = mint.MintLayer(1, 3, 2)
layer.inverse(layer(torch.randn(2, 1, 3, 3))[0].detach())
print(mint.__file__)
"""


def run(command: list[str | Path], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_imports_from_a_bare_checkout() -> None:
    where = run([sys.executable, "-W", "error", "-c", BARE_IMPORT], ROOT)
    assert where == str(ROOT / "mintnet_triton" / "__init__.py")


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
    options: list[str | Path] = ["--no-isolation", "--outdir", folder / "dist"]
    run([sys.executable, "-m", "build", *options, folder / "source"], folder)
    return folder / "dist"


@pytest.mark.parametrize("kind", ["*.whl", pytest.param("*.tar.gz", marks=pytest.mark.full)])
def test_installs_and_imports_in_a_clean_environment(
    kind: str, built: Path, tmp_path: Path
) -> None:
    """A new environment that sees torch and numpy here, and nothing of the checkout."""
    (package,) = built.glob(kind)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([interpreter, "-c", code], tmp_path))
    (site / "torch_and_numpy.pth").write_text(sysconfig.get_path("purelib") + "\n")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", interpreter]
    run([*pip, "install", *offline, package], tmp_path)
    assert run([interpreter, "-c", BARE_IMPORT], tmp_path) == str(
        site / "mintnet_triton" / "__init__.py"
    )
    code = "import mintnet_triton as mint; print(mint.MintNet.from_preset('mnist').latent_shape)"
    assert run([interpreter, "-c", code], tmp_path) == "(16, 7, 7)"


def test_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in ("kernels/reference.py", "presets/mnist.toml", "py.typed", "recipes/demo.py"):
        assert f"mintnet_triton/{needed}" in names
    assert not any(
        name.startswith(("kernels/", "tests/", "bench/", "docs/", "examples/")) for name in names
    )


def test_sdist_holds_real_kernels(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive if "/" in member.name}
    assert members["mintnet_triton/kernels/reference.py"].isfile()
    assert "LICENSE" in members
