"""Compile time must not grow with depth."""

from experiments.benchmarks.compile_time import lower_update


def test_the_update_does_not_grow_with_depth():
    """Guards the scan over layers in the whole update, gradient and optimizer included. Time itself is measured by
    `experiments.benchmarks.compile_time` and by no test: it depends on the size of the program that XLA is given."""
    few, many = (len(lower_update(layers, responses=1).as_text().splitlines()) for layers in (3, 7))
    assert few == many > 1000
