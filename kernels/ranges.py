"""Which input channels a tile of outputs sees: what is skipped is decided here alone.

Plain functions of plain integers: Triton's kernels compute with them, those for CPUs, and whoever
counts the work of a schedule. Triton looks for its own words here, but need not be installed.
"""

import contextlib

with contextlib.suppress(ModuleNotFoundError):
    import triton.language as tl


def seen_inputs(
    first,
    last,
    units,
    colours,
    PLACE: "tl.constexpr",
    ORDER: "tl.constexpr",
    TRIANGLE: "tl.constexpr",
):
    """The input channels that output colours ``first`` to ``last`` see, as [low, high).

    PLACE is negative for taps before the centre in reading order, 0 for the centre. ORDER is
    "channel" or "pixel", "own" for each colour seeing itself alone, or "dense" for seeing all.
    TRIANGLE is "lower", "upper", or "below": lower, but for a colour's own centre.
    """
    low = 0 * first
    high = 0 * first + units * colours
    if ORDER == "own":
        low = first * units
        high = (last + 1) * units
    elif ORDER == "dense":
        high += 0
    elif TRIANGLE == "lower" or TRIANGLE == "below":
        if PLACE > 0 and ORDER == "pixel":
            high = 0 * units
        elif PLACE > 0 or (PLACE == 0 and TRIANGLE == "below"):
            high = last * units
        elif PLACE == 0 or ORDER == "channel":
            high = (last + 1) * units
    else:
        if PLACE < 0:
            if ORDER == "channel":
                low = (first + 1) * units
            else:
                low = units * colours
        elif PLACE == 0 or ORDER == "channel":
            low = first * units
    return low, high


def first_block(low, high, BLOCK_K: "tl.constexpr"):
    """Where blocks of BLOCK_K channels begin that cover [low, high): beyond high if it is empty.

    A multiple of BLOCK_K, and Triton has to see that it is: loads are as wide as it knows.
    """
    if low >= high:
        low = high + BLOCK_K - 1
    return low // BLOCK_K * BLOCK_K
