"""The projector: features (N, T, C) -> (N, T, D), the LLM's width.

The blog's configuration tables call the connector a "2-Layer Relu MLP"; the released code uses
GELU. Both are here.
"""

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Projector(nn.Sequential):
    """Linear, activation, Linear. With a `scale`, the output has that root mean square.

    An LLM's embeddings are small, about 0.02 to 0.05 each. A short stage 1, in which the LLM is
    frozen, learns best from visual tokens that have this size from the first step on.
    """

    def __init__(self, width: int, dim: int, activation: str = "relu", scale: float = 0.0):
        super().__init__(nn.Linear(width, dim), ACTIVATIONS[activation](), nn.Linear(dim, dim))
        if scale:
            norm = nn.RMSNorm(dim)
            nn.init.constant_(norm.weight, scale)
            self.append(norm)
