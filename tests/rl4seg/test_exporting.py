"""The actor for other programs."""

from __future__ import annotations

import torch

from medrl.core.export import checkpoint_of, networks_of
from medrl.plugins.rl4seg.predict import restore


def test_the_exported_actor_gives_the_probabilities_of_the_policy(loop_run, manager):
    checkpoint = checkpoint_of(loop_run)
    (network,) = networks_of(checkpoint, manager).values()
    _, plan, actor = restore(checkpoint, manager)
    images = network.phantoms(2)
    found = torch.softmax(network.answers(images)["logits"], dim=1)
    with torch.no_grad():
        assert torch.allclose(found, actor.probabilities(*images), atol=1e-6)
    assert dict(network.label_names) == dict(plan.label_names)
    assert not next(iter(network.weights.state_dict())).startswith("network.")
