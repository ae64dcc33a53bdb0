"""The projector: features (N, T, C) -> (N, T, D), the LLM's width.

The blog's configuration tables call the connector a "2-Layer Relu MLP"; the released code uses
GELU. Both are here.
"""

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Projector(nn.Sequential):
    """Linear, activation, Linear; with a `scale`, the output has that root mean square.

    An LLM's embeddings are small (about 0.02 to 0.05 each): tokens of that size from the first
    step on are what a short stage 1, with the LLM frozen, learns from best.
    """

    def __init__(self, width: int, dim: int, activation: str = "relu", scale: float = 0.0):
        layers = [nn.Linear(width, dim), ACTIVATIONS[activation](), nn.Linear(dim, dim)]
        if scale:
            layers.append(nn.RMSNorm(dim))
            nn.init.constant_(layers[-1].weight, scale)
        super().__init__(*layers)
