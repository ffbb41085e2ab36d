"""The toy network."""

from torch import nn


class Line(nn.Linear):
    def __init__(self, features: int = 1) -> None:
        super().__init__(features, 1)


def networks(checkpoint, manager):
    from medrl.core.export import Network

    line = Line(checkpoint.states["student"]["weight"].shape[1])
    line.load_state_dict(checkpoint.states["student"])
    return {"line": Network(module=line, inputs={"points": (line.in_features,)}, outputs=("heights",))}
