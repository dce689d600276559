"""The table of cases as a suite of pytest-benchmark: ``pytest bench``.

Every rival is compared with float64 first: what is wrong fails, and is not timed. A group is a case
and a pass, so that rivals stand side by side. pytest-benchmark times one rival after the other;
``python -m bench run`` times them in turns, and is what documents quote.
"""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contest.cases import Case, Pass, all_cases, is_emulated
from bench.contest.rivals import UnavailableError
from bench.measure.race import Problem, precision_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device(metafunc.config.getoption("device"))
    full = metafunc.config.getoption("full") or device.type == "cuda"
    parameters = [
        pytest.param(case, pass_, rival, id=f"{case.section}: {case.name}: {pass_}: {rival}")
        for case in all_cases(device, "full" if full else "quick")
        for pass_ in case.passes
        for rival in case.rivals_of(pass_)
    ]
    metafunc.parametrize(("case", "pass_", "rival"), parameters)


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    """The last problem, for rivals come one after the other."""
    return {}


def test_case(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    problems: dict[str, Any],
    case: Case,
    pass_: Pass,
    rival: str,
) -> None:
    device = torch.device(request.config.getoption("device"))
    if is_emulated(case.mode, device):
        pytest.skip(f"this processor has no instructions for {case.mode.name}")
    if problems.get("case") is not case:
        problems.clear()
        problems |= {"case": case, "problem": Problem(case, device)}
    with precision_of(case.mode):
        try:
            contender = problems["problem"].contender(pass_, rival)
            error = contender.check()["error"]
        except UnavailableError as reason:
            pytest.skip(str(reason))
        if [times for _, times in contender.parts] != [1]:
            pytest.skip("extrapolated from a part of it: python -m bench run does that")
        work = contender.parts[0][0]
        benchmark.group = f"{case.section}: {case.name}: {pass_}"
        benchmark.extra_info.update(rival=rival, error=error)

        def call() -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=9, warmup_rounds=2)
