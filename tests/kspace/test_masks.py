import numpy as np
import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.masks import (
    apply_order,
    centre_block,
    density_mask,
    density_masks,
    equispaced_columns,
    initial_mask,
    low_to_high_order,
    random_order,
    training_masks,
    triangular,
    validation_masks,
    variable_density_order,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def listed(mask):
    return mask.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("width", "count", "block"),
    [(64, 4, (30, 34)), (64, 0, (32, 32)), (368, 30, (169, 199)), (7, 1, (3, 4)), (7, 2, (3, 5))],
)
def test_the_centre_block_begins_where_the_specification_says(width, count, block):
    assert centre_block(width, count) == block
    assert centre_block(width, count)[0] == (width - count + 1) // 2


def test_initial_masks_leave_padding_out():
    assert listed(initial_mask(64, 4)[0]) == [30, 31, 32, 33]
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, :4] = True
    mask = initial_mask(8, 4, padding=padding)
    assert [listed(row) for row in mask] == [[2, 3, 4, 5], [4, 5]]
    assert not initial_mask(8, 0).any()


def test_worked_training_mask_has_the_middle_and_two_of_the_rest():
    masks = density_masks(8, torch.full((4000,), 0.5, dtype=torch.float64), generator())
    assert (masks.sum(dim=1) == 4).all()
    assert masks[:, [3, 4]].all()
    assert triangular(6).tolist() == [1, 2, 3, 3, 2, 1]
    # The chance that a column is among the two, by hand: first draw w/12, then w/(12 - first).
    weights = dict(zip((0, 1, 2, 5, 6, 7), (1, 2, 3, 3, 2, 1), strict=True))
    for column, weight in weights.items():
        chance = weight / 12 + sum(
            other / 12 * weight / (12 - other) for name, other in weights.items() if name != column
        )
        share = float(masks[:, column].double().mean())
        assert share == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 4000))


@pytest.mark.parametrize(
    ("width", "fraction"), [(10, 0.25), (10, 0.45), (6, 0.75), (256, 0.05), (256, 1.0), (7, 0.5), (9, 0.0)]
)
def test_counts_are_rounded_as_python_rounds(width, fraction):
    mask = density_mask(width, fraction, generator())
    total, centre = round(width * fraction), round(width * fraction / 2)
    assert int(mask.sum()) == total
    first, last = centre_block(width, centre)
    assert mask[first:last].all()
    # 2.5 and 4.5 become 2 and 4: half to even.
    assert (round(2.5), round(4.5)) == (2, 4)


def test_training_masks_follow_the_fraction_that_was_drawn():
    masks = training_masks(2000, 64, generator(), low=0.05, high=1.0)
    counts = masks.sum(dim=1)
    assert int(counts.min()) >= 3
    assert int(counts.max()) <= 64
    assert float(counts.double().mean()) == pytest.approx(64 * 0.525, abs=4 * 64 * 0.95 / np.sqrt(12 * 2000))
    assert torch.equal(masks, training_masks(2000, 64, generator()))
    with pytest.raises(ConfigError):
        training_masks(1, 8, generator(), low=0.5, high=0.2)


def test_training_masks_never_take_padding():
    padding = torch.zeros(300, 20, dtype=torch.bool)
    padding[:, :5] = True
    masks = training_masks(300, 20, generator(), padding=padding)
    assert not (masks & padding).any()
    full = density_masks(20, torch.ones(300, dtype=torch.float64), generator(), padding=padding)
    assert torch.equal(full, ~padding)


def test_weighted_order_draws_like_numpy_without_replacement():
    free = torch.ones(6000, 5, dtype=torch.bool)
    pairs = variable_density_order(free, generator())[:, :2]
    chance = triangular(5).numpy() / 9
    rng = np.random.default_rng(0)
    drawn = np.array([rng.choice(5, 2, replace=False, p=chance) for _ in range(6000)])
    for column in range(5):
        ours = float((pairs == column).any(dim=1).double().mean())
        assert ours == pytest.approx((drawn == column).any(axis=1).mean(), abs=0.035)


def test_validation_masks_are_fixed_by_name_and_turn():
    names = [f"case{number}" for number in range(8)]
    masks = validation_masks(names, 64)
    assert masks.sum(dim=1).tolist() == [64, 16, 8, 4, 64, 16, 8, 4]
    assert torch.equal(masks, validation_masks(names, 64))
    assert torch.equal(masks[:4], validation_masks(names[:4], 64))
    assert not torch.equal(masks, validation_masks(names, 64, seed=1))
    assert not torch.equal(masks[1], masks[5])
    with pytest.raises(ConfigError):
        validation_masks(names, 64, accelerations=(0.5,))


def test_low_to_high_goes_outwards_in_turn():
    free = ~initial_mask(64, 4)
    assert low_to_high_order(free, 4)[0, :6].tolist() == [34, 29, 35, 28, 36, 27]
    assert low_to_high_order(torch.ones(1, 64, dtype=torch.bool))[0, :5].tolist() == [32, 33, 31, 34, 30]
    assert low_to_high_order(torch.ones(1, 7, dtype=torch.bool))[0].tolist() == [3, 4, 2, 5, 1, 6, 0]
    odd = ~initial_mask(7, 2)
    assert low_to_high_order(odd, 2)[0].tolist() == [5, 2, 6, 1, 0, -1, -1]


def test_orders_name_every_free_column_once_and_no_other():
    free = torch.rand(5, 30, generator=generator()) < 0.6
    for order in (
        low_to_high_order(free, 4),
        random_order(free, generator(1)),
        variable_density_order(free, generator(2)),
    ):
        for row, allowed in zip(order, free, strict=True):
            count = int(allowed.sum())
            assert sorted(row[:count].tolist()) == listed(allowed)
            assert (row[count:] == -1).all()


def test_equispaced_columns_are_spread_over_the_free_ones():
    free = ~initial_mask(64, 4)
    chosen = equispaced_columns(free, 12)[0].tolist()
    places = listed(free[0])
    assert chosen == [places[number] for number in np.round(np.linspace(0, 59, 12)).astype(int)]
    assert equispaced_columns(torch.tensor([[True, False, True]]), 3).tolist() == [[0, 2, -1]]
    assert equispaced_columns(torch.ones(1, 5, dtype=torch.bool), 1).tolist() == [[0]]
    with pytest.raises(ConfigError):
        equispaced_columns(free, 0)


def test_budgets_of_each_item_are_kept():
    mask = initial_mask(16, 2, batch=3)
    order = random_order(~mask, generator())
    grown = apply_order(mask, order, torch.tensor([0, 3, 99]))
    assert grown.sum(dim=1).tolist() == [2, 5, 16]
    assert listed(grown[1]) == sorted(listed(mask[1]) + order[1, :3].tolist())
    assert torch.equal(mask, initial_mask(16, 2, batch=3))
