import pytest

from bench.ratios import ratios


def test_ratio_is_naive_over_ours() -> None:
    result = {
        "benchmarks": [
            {"group": "a", "extra_info": {"rival": "naive"}, "stats": {"median": 6.0}},
            {"group": "a", "extra_info": {"rival": "mintnet_triton"}, "stats": {"median": 1.5}},
        ]
    }
    assert ratios(result) == {"a": pytest.approx(4.0)}
