import math

import pytest
import torch
from torch.distributions import Dirichlet

from medrl.core.errors import RuntimeFault
from medrl.core.rl.distributions import DirichletPolicy, MaskedCategorical


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_masked_probabilities_renormalise_over_the_legal_actions():
    policy = MaskedCategorical(torch.tensor([[1.0, 2.0, 3.0]]).log(), torch.tensor([[True, False, True]]))
    torch.testing.assert_close(policy.probs, torch.tensor([[0.25, 0.0, 0.75]]))
    assert policy.log_prob(torch.tensor([2])).item() == pytest.approx(math.log(0.75))
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert policy.entropy().item() == pytest.approx(expected)


def test_one_legal_action_has_entropy_and_log_probability_zero():
    policy = MaskedCategorical(torch.tensor([[5.0, -3.0, 0.1]]), torch.tensor([[False, True, False]]))
    assert policy.entropy().item() == 0.0
    assert policy.log_prob(torch.tensor([1])).item() == 0.0
    assert policy.mode().item() == 1


def test_uniform_entropy_over_three_actions_is_log_three():
    assert MaskedCategorical(torch.zeros(3)).entropy().item() == pytest.approx(1.0986, abs=1e-4)


def test_gradients_are_finite_and_zero_at_illegal_actions():
    logits = torch.tensor([[0.3, -0.2, 1.0, 4.0]], requires_grad=True)
    policy = MaskedCategorical(logits, torch.tensor([[True, False, True, False]]))
    (policy.log_prob(torch.tensor([0])).sum() + policy.entropy().sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == 0
    assert logits.grad[0, 3] == 0
    assert logits.grad[0, 0] != 0


def test_samples_are_always_legal_and_follow_the_probabilities():
    mask = torch.tensor([True, False, True, True])
    policy = MaskedCategorical(torch.tensor([0.0, 50.0, 1.0, 2.0]).expand(20000, 4), mask.expand(20000, 4))
    drawn = torch.bincount(policy.sample(generator()), minlength=4) / 20000
    assert drawn[1] == 0
    torch.testing.assert_close(drawn, policy.probs[0], atol=0.015, rtol=0)


def test_the_same_generator_state_draws_the_same_actions():
    policy = MaskedCategorical(torch.zeros(64, 9))
    assert torch.equal(policy.sample(generator(3)), policy.sample(generator(3)))
    assert not torch.equal(policy.sample(generator(3)), policy.sample(generator(4)))


def test_the_mode_is_the_best_legal_action():
    policy = MaskedCategorical(torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[False, True, True]]))
    assert policy.mode().tolist() == [2]


def test_any_batch_shape_works_as_for_one_policy_a_voxel():
    policy = MaskedCategorical(torch.randn(2, 3, 4, 5, generator=generator()))
    actions = policy.sample(generator(1))
    assert actions.shape == policy.log_prob(actions).shape == policy.entropy().shape == (2, 3, 4)


def test_a_state_without_a_legal_action_is_refused():
    with pytest.raises(RuntimeFault, match="no legal action"):
        MaskedCategorical(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


def test_an_illegal_action_has_no_log_probability():
    policy = MaskedCategorical(torch.zeros(1, 2), torch.tensor([[True, False]]))
    with pytest.raises(RuntimeFault, match="illegal"):
        policy.log_prob(torch.tensor([1]))


def test_a_non_finite_legal_logit_is_refused_and_an_illegal_one_is_not():
    logits = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(RuntimeFault, match="not finite"):
        MaskedCategorical(logits)
    assert MaskedCategorical(logits, torch.tensor([[True, False]])).probs.tolist() == [[1.0, 0.0]]


def test_bfloat16_logits_are_computed_in_float32():
    assert MaskedCategorical(torch.zeros(2, 3, dtype=torch.bfloat16)).entropy().dtype == torch.float32


def test_dirichlet_agrees_with_hand_computed_numbers():
    policy = DirichletPolicy(torch.full((3,), 3.0))
    assert policy.log_prob(torch.tensor([0.5, 0.3, 0.2])).item() == pytest.approx(1.5120, abs=1e-4)
    assert policy.entropy().item() == pytest.approx(-1.2180, abs=1e-4)


def test_dirichlet_agrees_with_torch_distributions():
    alpha = torch.rand(6, 5, generator=generator(), dtype=torch.float64) * 4 + 0.2
    ours, oracle = DirichletPolicy(alpha), Dirichlet(alpha)
    weights = ours.sample(generator(1))
    torch.testing.assert_close(ours.log_prob(weights), oracle.log_prob(weights))
    torch.testing.assert_close(ours.entropy(), oracle.entropy())
    torch.testing.assert_close(ours.mean, oracle.mean)


def test_dirichlet_samples_have_the_mean_and_variance_of_the_distribution():
    alpha = torch.tensor([0.3, 1.0, 4.0])
    drawn = DirichletPolicy(alpha.expand(40000, 3)).sample(generator())
    torch.testing.assert_close(drawn.mean(0), alpha / alpha.sum(), atol=0.005, rtol=0)
    torch.testing.assert_close(drawn.var(0), Dirichlet(alpha).variance, atol=0.003, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 0.05, 1.0, 50.0])
def test_dirichlet_samples_stay_inside_the_simplex(dtype, size):
    policy = DirichletPolicy(torch.full((500, 5), size, dtype=dtype))
    drawn = policy.sample(generator())
    assert (drawn > 0).all()
    assert (drawn.sum(-1) - 1).abs().max() < 1e-6
    assert torch.isfinite(policy.log_prob(drawn)).all()


def test_dirichlet_around_a_mean_has_nearly_that_mean():
    mean = torch.tensor([0.7, 0.2, 0.1, 0.0])
    policy = DirichletPolicy.around(mean, kappa=20.0)
    torch.testing.assert_close(policy.concentration, torch.tensor([14.001, 4.001, 2.001, 0.001]))
    torch.testing.assert_close(policy.mean, mean, atol=1e-3, rtol=0)


def test_dirichlet_gradients_agree_with_torch_distributions():
    weights = torch.tensor([0.5, 0.3, 0.2])
    ours = torch.tensor([2.0, 3.0, 0.5], requires_grad=True)
    oracle = ours.detach().clone().requires_grad_()
    (DirichletPolicy(ours).log_prob(weights) + DirichletPolicy(ours).entropy()).backward()
    (Dirichlet(oracle).log_prob(weights) + Dirichlet(oracle).entropy()).backward()
    torch.testing.assert_close(ours.grad, oracle.grad)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_concentration_is_refused(bad):
    with pytest.raises(RuntimeFault, match="concentration"):
        DirichletPolicy(torch.tensor([1.0, bad]))
