import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfinetune.training.data.stratify import hold_out, subset

CLASS_SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def labels_of(sizes: list[int], seed: int) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(labels)


@settings(deadline=None)
@given(CLASS_SIZES, st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_hold_out_divides_every_class_by_its_share(sizes, fraction, seed):
    labels = labels_of(sizes, seed)
    kept, held = hold_out(labels, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    by_class = np.bincount(labels[held], minlength=len(sizes))
    assert (np.abs(by_class - fraction * np.array(sizes)) < 1 + 1e-6).all()
    assert (by_class < np.array(sizes)).all()
    assert len(held) <= round(fraction * len(labels))
    if min(sizes) > 1 / (1 - fraction):
        assert len(held) == round(fraction * len(labels))


@settings(deadline=None)
@given(CLASS_SIZES, st.data(), st.integers(0, 2**32 - 1))
def test_subset_has_the_size_and_every_class(sizes, data, seed):
    labels = labels_of(sizes, seed)
    size = data.draw(st.integers(len(sizes), len(labels)))
    rows = subset(labels, size, seed)
    assert len(rows) == len(set(rows.tolist())) == size
    by_class = np.bincount(labels[rows], minlength=len(sizes))
    assert (by_class >= 1).all()
    share = np.array(sizes) * size / len(labels)
    if share.min() >= 1:
        assert (np.abs(by_class - share) < 1 + 1e-6).all()


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
def test_several_labels_are_divided_by_the_share_of_rows(rows, classes, fraction, density, seed):
    labels = (np.random.default_rng(seed).random((rows, classes)) < density).astype(np.uint8)
    kept, held = hold_out(labels, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(rows))
    assert len(held) == round(fraction * rows)
    again = hold_out(labels, fraction, seed)
    assert np.array_equal(held, again[1])


def test_several_labels_are_nearer_to_their_shares_than_by_chance():
    """Labels of 4 to 200 of 1,000 rows, some of them always together."""
    rng = np.random.default_rng(0)
    labels = (rng.random((1000, 12)) < np.geomspace(0.004, 0.2, 12)).astype(np.uint8)
    labels[:, 5] = labels[:, 4]
    counts = labels.sum(0, dtype=int)

    def error(rows):
        return np.abs(labels[rows].sum(0, dtype=int) - 0.2 * counts) / np.sqrt(counts)

    ours = np.array([error(hold_out(labels, 0.2, seed)[1]) for seed in range(10)])
    chance = np.array([error(rng.choice(1000, 200, replace=False)) for _ in range(10)])
    assert ours.mean() < chance.mean() / 3
    chosen = subset(labels, 60, 1)
    assert len(set(chosen.tolist())) == 60
    assert (labels[chosen].sum(0) >= 1).all()


def test_choice_depends_on_the_seed_alone():
    labels = labels_of([20, 30, 10], 0)
    assert np.array_equal(hold_out(labels, 0.3, 7)[1], hold_out(labels, 0.3, 7)[1])
    assert not np.array_equal(hold_out(labels, 0.3, 7)[1], hold_out(labels, 0.3, 8)[1])
    assert np.bincount(labels[hold_out(labels, 0.3, 7)[1]]).tolist() == [6, 9, 3]
    assert np.bincount(labels[subset(labels, 12, 7)]).tolist() == [4, 6, 2]
