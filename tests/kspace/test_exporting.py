"""Policy and segmentation network for other programs."""

from __future__ import annotations

import torch

from medrl.core.checkpoint import find_checkpoint
from medrl.core.export import checkpoint_of, networks_of
from medrl.plugins.kspace.agent import FaithfulAgent
from medrl.plugins.kspace.exporting import policy_network
from medrl.plugins.kspace.restoring import restore


def test_exported_networks_say_what_those_of_the_run_say(policy_run, manager):
    checkpoint = checkpoint_of(find_checkpoint(policy_run, "last"))
    found = networks_of(checkpoint, manager)
    assert list(found) == ["policy", "segmenter"]
    run = restore(checkpoint, manager, torch.device("cpu"))
    columns, pooled = found["policy"].phantoms(2)
    with torch.no_grad():
        logits, values = run.policy().logits_and_values({"columns": columns, "pooled": pooled})
        image = found["segmenter"].phantoms(2)
        folded = run.imaging.segmenter(*image)
    answers = found["policy"].answers((columns, pooled))
    assert torch.equal(answers["logits"], logits)
    assert torch.equal(answers["value"], values)
    assert torch.allclose(found["segmenter"].answers(image)["logits"], folded, atol=1e-5)


def test_the_policy_on_images_takes_real_and_imaginary_parts():
    torch.manual_seed(0)
    agent = FaithfulAgent(actions=32, image_shape=(32, 32), steps_dim=5).eval()
    network = policy_network(agent)
    image, remaining = torch.randn(2, 2, 32, 32), torch.tensor([[1.0], [3.0]])
    with torch.no_grad():
        seen = {"image": torch.complex(image[:, 0], image[:, 1]), "remaining": remaining}
        assert torch.equal(network.answers((image, remaining))["logits"], agent.logits(seen))
    assert network.inputs == {"image": (2, 32, 32), "remaining": (1,)}
