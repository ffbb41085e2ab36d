"""The actor for other programs."""

from __future__ import annotations

import torch

from medrl.core.export import checkpoint_of, networks_of


def test_the_exported_actor_is_that_of_the_run(loop_run, manager, tools):
    checkpoint = checkpoint_of(loop_run)
    (network,) = networks_of(checkpoint, manager).values()
    assert tools.same(dict(network.module.state_dict()), dict(checkpoint.states["actor"]))
    images = network.phantoms(2)
    found = network.answers(images)["logits"]
    assert (tuple(images[0].shape), tuple(found.shape)) == ((2, 1, 64, 64, 4), (2, 3, 64, 64, 4))
    assert bool(torch.isfinite(found).all())
    assert dict(network.label_names) == {"background": 0, "LV": 1, "MYO": 2}
    assert network.windows
