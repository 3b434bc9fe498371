"""The order of examples: every one each epoch, one bucket a batch, a pure function of (seed, index)."""

from collections import Counter
from itertools import chain

import pytest

from studio.data.order import Order

TALL, WIDE, SQUARE = (384, 704), (704, 384), (512, 512)
MIXED = [TALL, SQUARE, WIDE, SQUARE, SQUARE, TALL, SQUARE, SQUARE, SQUARE]  # 2 tall, 1 wide, 6 square


def epoch_of(order: Order, epoch: int) -> list[list[int]]:
    start = sum(order.batches(e) for e in range(epoch))
    return [order.batch(start + i) for i in range(order.batches(epoch))]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 16])
def test_every_epoch_shows_every_example_in_full_batches_of_one_bucket(batch_size):
    order = Order(MIXED, batch_size, seed=3)
    for epoch in range(4):
        batches = epoch_of(order, epoch)
        assert all(len(batch) == batch_size for batch in batches)
        assert all(len({MIXED[i] for i in batch}) == 1 for batch in batches)
        shown = Counter(chain(*batches))
        assert set(shown) == set(range(len(MIXED)))
        assert order.repeats(epoch) == shown.total() - len(MIXED)


def test_the_report_counts_repeats():
    assert Order(MIXED, 1, 0).repeats() == 0
    assert Order(MIXED, 2, 0).repeats() == 1  # one for the single wide picture
    assert Order(MIXED, 4, 0).repeats() == 2 + 3 + 2


def test_repeats_are_spread_evenly():
    shown = Counter(chain(*epoch_of(Order(["a"] * 3, 8, seed=1), 0)))
    assert sorted(shown.values()) == [2, 3, 3]


def test_a_filled_batch_shows_no_example_twice_if_the_bucket_has_enough():
    for seed in range(20):
        for batch in epoch_of(Order(["a"] * 5, 4, seed), 0):
            assert len(set(batch)) == 4


def test_a_fresh_order_gives_the_same_batch_at_any_index():
    order = Order(MIXED, 2, seed=5, prior=[SQUARE] * 7)
    walked = [order.batch(i) for i in range(60)]
    assert [Order(MIXED, 2, seed=5, prior=[SQUARE] * 7).batch(i) for i in (59, 0, 31, 17)] == [
        walked[i] for i in (59, 0, 31, 17)
    ]
    assert [order.batch(i) for i in reversed(range(60))] == walked[::-1]


def test_far_indices_cost_no_walk():
    far = Order(MIXED, 2, seed=5).batch(10**15)
    assert len(far) == 2
    assert Order(MIXED, 2, seed=5).batch(10**15) == far


def test_epochs_and_seeds_differ():
    first = Order(["a"] * 12, 1, seed=0)
    assert epoch_of(first, 0) != epoch_of(first, 1)
    assert epoch_of(first, 0) != epoch_of(Order(["a"] * 12, 1, seed=1), 0)


def test_the_order_is_the_same_in_every_version():
    assert [Order(["a", "a", "b"], 2, seed=0).batch(i) for i in range(4)] == KNOWN


def test_each_epoch_has_as_many_class_pictures_as_examples():
    order = Order(["a"] * 4, 2, seed=0, prior=["a"] * 10)
    for epoch in range(5):
        batches = epoch_of(order, epoch)
        assert order.repeats(epoch) == 0
        for batch in batches:  # equal counts are spread evenly, so each batch of two has one of each
            assert sum(i < 4 for i in batch) == 1


def test_class_pictures_come_in_turn_over_epochs():
    order = Order(["a"] * 4, 2, seed=0, prior=["a"] * 10)
    shown = Counter(i for epoch in range(5) for i in chain(*epoch_of(order, epoch)) if i >= 4)
    assert shown == dict.fromkeys(range(4, 14), 2)  # 5 epochs of 4 are twice 10


def test_few_class_pictures_are_shown_repeatedly():
    order = Order(["a"] * 6, 1, seed=0, prior=["a"] * 2)
    assert Counter(i for i in chain(*epoch_of(order, 0)) if i >= 6) == {6: 3, 7: 3}


def test_class_pictures_in_many_buckets_keep_buckets_pure_and_examples_whole():
    buckets, prior = [TALL, SQUARE, SQUARE], [SQUARE, WIDE, TALL, WIDE, SQUARE, SQUARE, WIDE]
    everything = buckets + prior
    order = Order(buckets, 3, seed=2, prior=prior)
    shown = Counter()
    for epoch in range(14):  # the class pictures come round after 7
        batches = epoch_of(order, epoch)
        assert all(len(b) == 3 and len({everything[i] for i in b}) == 1 for b in batches)
        assert {0, 1, 2} <= set(chain(*batches))
        assert sum(map(len, batches)) == 6 + order.repeats(epoch)
        shown.update(set(chain(*batches)))
    assert set(shown) == set(range(10))


def test_filling_makes_up_for_buckets_of_one_kind():
    # Three wide examples need one repeat for batches of two; the class picture that fills the square bucket evens it.
    order = Order([WIDE] * 3 + [SQUARE] * 2, 2, seed=0, prior=[SQUARE] * 20)
    for epoch in range(4):
        shown = list(chain(*epoch_of(order, epoch)))
        assert sum(i < 5 for i in shown) == sum(i >= 5 for i in shown) == 6


def test_an_order_needs_examples():
    with pytest.raises(ValueError, match="needs examples"):
        Order([], 1, 0)


# Written down once: a change means that old checkpoints would resume on other pictures.
KNOWN = [[1, 0], [2, 2], [2, 2], [0, 1]]
