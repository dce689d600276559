"""The activations of :mod:`.activation` inside kernels, by name.

Values are float32 or float64: half-precision operands are widened before they come here.
"""

import triton
import triton.language as tl

from mintnet_triton.kernels import activation

LEAKY_SLOPE = tl.constexpr(activation.LEAKY_SLOPE)


@triton.jit
def activate(a, NAME: tl.constexpr):
    """h(a)."""
    if NAME == "elu":
        h = tl.where(a < 0, tl.exp(a) - 1, a)  # tl.minimum would lose NaN
    elif NAME == "leaky_relu":
        h = tl.where(a > 0, a, a * LEAKY_SLOPE)
    elif NAME == "softplus":
        h = tl.maximum(a, 0.0) + tl.log(1 + tl.exp(-tl.abs(a)))
    elif NAME == "tanh":
        h = 2 / (1 + tl.exp(-2 * a)) - 1
    elif NAME == "sigmoid":
        h = 1 / (1 + tl.exp(-a))
    else:
        tl.static_assert(NAME == "identity")
        h = a
    return h


@triton.jit
def slope(h, NAME: tl.constexpr):
    """h'(a), read off h(a)."""
    if NAME == "elu":
        s = tl.where(h > 0, 1.0, h + 1).to(h.dtype)
    elif NAME == "leaky_relu":
        # Not of two Python floats, which would be float32.
        s = tl.where(h > 0, tl.full(h.shape, 1.0, h.dtype), tl.full(h.shape, LEAKY_SLOPE, h.dtype))
    elif NAME == "softplus":
        s = 1 - tl.exp(-h)
    elif NAME == "tanh":
        s = 1 - h * h
    elif NAME == "sigmoid":
        s = h * (1 - h)
    else:
        tl.static_assert(NAME == "identity")
        s = tl.full(h.shape, 1.0, h.dtype)
    return s


@triton.jit
def slope_derivative(h, NAME: tl.constexpr):
    """d h'(a) / d h(a), so that h''(a) is this times h'(a)."""
    if NAME == "elu":
        d = tl.where(h < 0, 1.0, 0.0).to(h.dtype)
    elif NAME == "softplus":
        d = tl.exp(-h)
    elif NAME == "tanh":
        d = -2 * h
    elif NAME == "sigmoid":
        d = 1 - 2 * h
    else:
        tl.static_assert(NAME == "leaky_relu" or NAME == "identity")
        d = tl.zeros(h.shape, h.dtype)
    return d
