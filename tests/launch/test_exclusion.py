"""Which nodes a run stays away from, and for how long."""

from launch.outcome import nodes_to_exclude
from launch.record import Blame

HOUR = 3600.0


def _blame(node: str, hours_ago: float, *, certain: bool = False) -> Blame:
    return Blame(node=node, reason="it went down", time=(100 - hours_ago) * HOUR, certain=certain)


def test_a_node_is_left_out_for_two_failures_or_one_that_is_certain() -> None:
    blames = [_blame("a", 3), _blame("b", 2), _blame("a", 1), _blame("c", 1, certain=True)]
    assert nodes_to_exclude(blames, 100 * HOUR, 24) == ["a", "c"]


def test_after_some_hours_it_is_used_again() -> None:
    blames = [_blame("a", 25), _blame("a", 1), _blame("b", 23), _blame("b", 22), _blame("c", 25, certain=True)]
    assert nodes_to_exclude(blames, 100 * HOUR, 24) == ["b"]
    assert nodes_to_exclude(blames, 102 * HOUR, 24) == []
    assert nodes_to_exclude(blames, 100 * HOUR, 0) == []
