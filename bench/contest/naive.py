"""The Mint layer as the paper's formulas read, word for word: the baseline to beat.

Three dense convolutions, and the diagonal of the Jacobian as one broadcast product over
(B, K, K, C, H, W), summed over the hidden units. Nothing else is of that size: this is slow only
where the formula, read literally, is.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton import MintLayer, TriangularMap
from mintnet_triton.solvers import Evaluator


class NaiveMintLayer(MintLayer):
    """A :class:`MintLayer` with the same parameters and results, computed literally."""

    # What a layer does in kernels of its own, this one does by its evaluator.
    solve = TriangularMap.solve

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, diagonal = self._evaluate(x)
        return y, diagonal.log().flatten(1).sum(1)

    def evaluator(self) -> Evaluator:
        return self._evaluate

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.effective_weights()
        h, slope = self.activation.function, self.activation.derivative
        by_unit = (len(x), self.channels, self.hidden, *self.size)

        a1 = F.conv2d(x, weights.weight1, weights.bias1, padding="same")
        a2 = F.conv2d(h(a1), weights.weight2, weights.bias2, padding="same")
        y = F.conv2d(h(a2), weights.weight3, weights.bias3, padding="same") + weights.t * x

        # (B, K, C, H, W): the derivative of every hidden unit by its own pixel
        diagonal1 = slope(a1).reshape(by_unit).transpose(1, 2)
        diagonal1 = diagonal1 * weights.centre1.T[:, :, None, None]
        diagonal3 = slope(a2).reshape(by_unit).transpose(1, 2)
        diagonal3 = diagonal3 * weights.centre3.T[:, :, None, None]
        # (K, K, C, 1, 1) times (B, 1, K, C, H, W)
        centre2 = weights.centre2.permute(1, 2, 0)[..., None, None]
        diagonal2 = (centre2 * diagonal1.unsqueeze(1)).sum(2)
        return y, (diagonal2 * diagonal3).sum(1) + weights.t


def literally(module: nn.Module) -> nn.Module:
    """The module itself, each of its Mint layers made a naive one, with the same parameters."""
    for layer in module.modules():
        if type(layer) is MintLayer:
            layer.__class__ = NaiveMintLayer
    return module
