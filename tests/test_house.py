"""What the source itself has to keep to, read without importing it."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"

#: parameters of a kernel, constants counted; of any other function, ruff allows fewer
MOST = 24

#: what makes a kernel, or a function that is compiled into one
COMPILERS = {"triton.jit", "jit", "compiled", "summing", "called_through_pointer", "intrinsic"}


def functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def parameters(function: ast.FunctionDef) -> float:
    """How many a function takes: with ``*arguments``, any number."""
    given = function.args
    if given.vararg or given.kwarg:
        return float("inf")
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def is_compiled(function: ast.FunctionDef) -> bool:
    names = (one.func if isinstance(one, ast.Call) else one for one in function.decorator_list)
    return any(ast.unparse(name) in COMPILERS for name in names)


def compiled() -> dict[str, float]:
    """Parameters of every kernel, and of every function that is called by name in one."""
    files = {path: functions(path.read_text("utf-8")) for path in KERNELS.rglob("*.py")}
    every = [(path, one) for path, found in files.items() for one in found]
    called = {
        node.func.id
        for _, function in every
        if is_compiled(function)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {
        f"{path.relative_to(KERNELS).as_posix()}: {function.name}": parameters(function)
        for path, function in every
        if is_compiled(function) or function.name in called
    }


def test_no_kernel_takes_too_many_parameters() -> None:
    found = compiled()
    # Of both rooms, and a plain function that both compile.
    assert {"cpu/canvas.py: add_tile", "ranges.py: seen_inputs"} <= found.keys()
    assert any(name.startswith("gpu/") for name in found)
    offenders = {name: count for name, count in found.items() if count > MOST}
    assert not offenders


@pytest.mark.parametrize(
    ("signature", "count"),
    [
        ("f()", 0),
        ("f(a, b=1, /, c=2, *, D: 'constant')", 4),
        ("f(a, *more)", float("inf")),
        ("f(a, **more)", float("inf")),
    ],
)
def test_every_parameter_counts(signature: str, count: float) -> None:
    (function,) = functions(f"def {signature}: pass")
    assert parameters(function) == count


@pytest.mark.parametrize(
    ("decorator", "expected"),
    [
        ("@triton.jit", True),
        ("@triton.jit(do_not_specialize=['n'])", True),
        ("@compiled", True),
        ("@called_through_pointer(9)", True),
        ("@lru_cache", False),
    ],
)
def test_what_is_compiled_is_known(decorator: str, expected: bool) -> None:
    (function,) = functions(f"{decorator}\ndef f(): pass")
    assert is_compiled(function) == expected
