"""The toy network."""

from torch import nn


class Line(nn.Linear):
    def __init__(self, features: int = 1) -> None:
        super().__init__(features, 1)
