import pytest
import torch

from medrl.core.errors import CheckpointError
from medrl.core.rl.distributions import DirichletPolicy
from medrl.core.rl.reinforce import EmaBaseline, reinforce_loss, standardise


def test_the_loss_and_its_gradient_agree_with_hand_computed_numbers():
    logits = torch.tensor([0.0, 0.0], requires_grad=True)
    log_probs = torch.log_softmax(logits, -1)
    advantages = torch.tensor([2.0, -1.0])
    entropy = -(log_probs.exp() * log_probs).sum()
    loss = reinforce_loss(log_probs, advantages, entropy, 0.1)
    # -(2 * ln 0.5 - ln 0.5) / 2 - 0.1 * ln 2
    assert loss.item() == pytest.approx(0.346574 - 0.069315, abs=1e-6)
    loss.backward()
    # d/dz0 of -(2 log p0 - log p1) / 2 at p = 0.5 is -(2 * 0.5 + 0.5) / 2; the entropy is flat there.
    assert logits.grad.tolist() == pytest.approx([-0.75, 0.75])


def test_no_gradient_flows_into_the_advantages():
    advantages = torch.tensor([1.0], requires_grad=True)
    log_probs = torch.tensor([-0.5], requires_grad=True)
    reinforce_loss(log_probs, advantages).backward()
    assert advantages.grad is None
    assert log_probs.grad.item() == -1.0


def test_an_entropy_bonus_without_entropy_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="entropy"):
        reinforce_loss(torch.zeros(2), torch.zeros(2), None, 0.1)
    with pytest.raises(ValueError, match="differ"):
        reinforce_loss(torch.zeros(2), torch.zeros(2, 1))


def test_standardised_returns_agree_with_hand_computed_numbers():
    found = standardise(torch.tensor([50.99375, 52.625, 57.5]))
    torch.testing.assert_close(found, torch.tensor([-0.80128, -0.31940, 1.12068]), atol=1e-5, rtol=0)


def test_one_return_is_centred_and_stays_finite():
    assert standardise(torch.tensor([3.0])).tolist() == [0.0]
    assert standardise(torch.tensor([3.0]), centre=1.0).tolist() == [2.0]


def test_equal_returns_give_zeros_and_not_nan():
    assert standardise(torch.full((4,), 7.0)).tolist() == [0.0] * 4


def test_a_baseline_moves_the_centre_and_not_the_scale():
    values = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(standardise(values, centre=0.0), values)


def test_the_baseline_starts_at_the_first_return_and_then_moves_slowly():
    baseline = EmaBaseline(0.9)
    assert baseline.update(torch.tensor([1.0, 3.0])) == 2.0
    assert baseline.update(12.0) == pytest.approx(3.0)


def test_a_non_finite_return_leaves_the_baseline_as_it_was():
    baseline = EmaBaseline(0.5)
    baseline.update(4.0)
    assert baseline.update(float("nan")) == 4.0
    assert baseline.updates == 1


def test_the_baseline_survives_a_checkpoint():
    baseline = EmaBaseline(0.8)
    baseline.update(1.0)
    baseline.update(0.3)
    restored = EmaBaseline()
    restored.load_state_dict(baseline.state_dict())
    assert restored.update(9.0) == baseline.update(9.0)
    with pytest.raises(CheckpointError, match="value"):
        restored.load_state_dict({"momentum": 0.9})


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_finds_the_best_arm_of_a_bandit_over_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    quality = torch.tensor([0.2, 0.2, 0.9, 0.2, 0.2])
    preference = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.SGD([preference], lr=0.05)
    baseline = EmaBaseline(0.9)
    for _ in range(150):
        policy = DirichletPolicy.around(torch.softmax(preference, -1).expand(50, 5), kappa=20.0)
        weights = policy.sample(generator)
        rewards = (weights * quality).sum(-1) + 0.05 * torch.randn(50, generator=generator)
        advantages = standardise(rewards, centre=baseline.value if baseline.updates else None)
        baseline.update(rewards)
        optimizer.zero_grad()
        reinforce_loss(policy.log_prob(weights), advantages, policy.entropy(), 1e-3).backward()
        optimizer.step()
    assert torch.softmax(preference, -1)[2].item() >= 0.95
