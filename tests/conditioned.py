"""Layers with a context or a position bias, far from the identity and from what they start as."""

import torch

from mintnet_triton import MintLayer


@torch.no_grad()
def fill(layer: MintLayer, deviation: float = 0.5, *, conditions: bool = True) -> MintLayer:
    """The layer, with t of both signs; and what its condition comes from normal, if wanted."""
    layer.t.uniform_(0.3, 2).mul_(torch.randn_like(layer.t).sign())
    for network in (layer.position_bias, layer.context_network) if conditions else ():
        for parameter in () if network is None else network.parameters():
            parameter.normal_(std=deviation)
    return layer
