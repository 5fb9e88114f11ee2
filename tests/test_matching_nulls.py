"""What the nulls of matching keep of an SAE, what they do not, and how similarities are compared with them."""

import numpy as np
import pytest

from resa_hf.features.nulls import compare, random_directions, random_firings


def given_rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((4000, 6)) @ rng.standard_normal((6, 6))
    return (mixed + np.array([2, -1, 0, 0, 3, 0])).astype(np.float32)


def test_random_directions_keep_mean_and_covariance_and_point_elsewhere() -> None:
    rows = given_rows()
    (drawn,) = random_directions(rows, 1, np.random.default_rng(1))
    assert drawn.dtype == np.float32
    spread = np.sqrt(np.diag(np.cov(rows.T)))
    assert np.abs(drawn.mean(axis=0) - rows.mean(axis=0)).max() < 4 * spread.max() / np.sqrt(len(rows))
    assert np.cov(drawn.T) == pytest.approx(np.cov(rows.T), abs=0.08 * spread.max() ** 2)
    # The distance to the mean of each row stays, the direction does not.
    centred, moved = rows - rows.mean(axis=0), drawn - rows.mean(axis=0)
    assert np.linalg.norm(moved, axis=1) == pytest.approx(np.linalg.norm(centred, axis=1), rel=1e-3)
    cosines = (centred * moved).sum(axis=1) / (np.linalg.norm(centred, axis=1) * np.linalg.norm(moved, axis=1))
    assert abs(cosines.mean()) < 0.05


def test_draws_differ_and_are_seeded() -> None:
    one, other = random_directions(given_rows(), 2, np.random.default_rng(3))
    again, _ = random_directions(given_rows(), 2, np.random.default_rng(3))
    assert (one == again).all() and not (one == other).all()


@pytest.mark.parametrize("least", [0.0, 0.7])
def test_random_latents_fire_as_often_as_those_of_the_sae(least: float) -> None:
    rng = np.random.default_rng(0)
    x, directions = (rng.standard_normal(shape).astype(np.float32) for shape in ((50, 4), (5, 4)))
    directions *= np.array([[5], [1], [3], [2], [4]], dtype=np.float32)
    floor = np.full(50, least, dtype=np.float32)
    counts = np.array([0, 50, 3, 20, 11])
    latents = random_firings(x, floor, directions, counts).toarray()
    fired = np.diff(random_firings(x, floor, directions, counts).indptr)
    assert sorted(fired) == sorted(counts)
    products = x @ directions.T
    natural = (products > floor[:, None]).sum(axis=0)
    assert (np.diff(natural[np.argsort(fired, kind="stable")]) >= 0).all()
    for column in range(5):
        if fired[column] == 0:
            continue
        active = np.argsort(-products[:, column])[: fired[column]]
        assert set(np.flatnonzero(latents[:, column])) <= set(active)
        # A ReLU with a bias: differences between active tokens are those of the products.
        values = latents[active, column]
        assert values - values.mean() == pytest.approx(
            products[active, column] - products[active, column].mean(), abs=1e-4
        )
        assert (values >= least - 1e-5).all()


def test_comparison_with_a_null_by_hand() -> None:
    drawn = np.arange(1.0, 101.0).reshape(5, 20)  # the largest five are all in the last draw
    threshold, share, null_share = compare(np.array([1.0, 95.0, 96.0, 200.0]), drawn)
    assert threshold == pytest.approx(95.05)  # the 95th percentile of 1 to 100, interpolated as numpy does
    assert share.estimate == 0.5
    # Wilson's interval for 2 of 4.
    assert (share.low, share.high) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert null_share == (0.0, 0.25)


def test_the_null_interval_holds_a_further_draw_with_its_probability() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        drawn = rng.standard_normal((40, 200))
        _, share, (low, high) = compare(drawn[0], drawn[1:])
        held.append(low <= share.estimate <= high)
    # Shares are multiples of 1/200, and ties with the ends count as held: somewhat above 95%.
    assert 0.94 < np.mean(held) < 0.99
