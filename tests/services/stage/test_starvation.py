"""Whose fault it was that a stage had nothing to compute."""

from __future__ import annotations

from services.stage.starvation import Arrival, Starvation, attribute


def test_without_an_order_the_schedule_was_late_and_at_last_its_wire() -> None:
    starved = attribute(
        since_ns=100, until_ns=200, order=Arrival(at_ns=190, wire_ns=30), activations=None
    )
    assert starved == Starvation(schedule_ns=60, wire_ns=30 + 10)


def test_with_an_order_upstream_was_late_then_frames_were_made_and_sent() -> None:
    starved = attribute(
        since_ns=100,
        until_ns=200,
        order=Arrival(at_ns=50),
        activations=Arrival(at_ns=195, wire_ns=20, serialise_ns=5),
    )
    assert starved == Starvation(upstream_ns=70, serialise_ns=5, wire_ns=20 + 5)


def test_what_took_place_before_the_wait_does_not_count() -> None:
    starved = attribute(
        since_ns=100,
        until_ns=104,
        order=Arrival(at_ns=90, wire_ns=1000),
        activations=Arrival(at_ns=103, wire_ns=50, serialise_ns=50),
    )
    assert starved == Starvation(wire_ns=4)


def test_activations_that_came_before_their_order_were_not_missed() -> None:
    starved = attribute(
        since_ns=100,
        until_ns=160,
        order=Arrival(at_ns=150),
        activations=Arrival(at_ns=120, wire_ns=20),
    )
    assert starved == Starvation(schedule_ns=50, wire_ns=10)


def test_the_causes_add_up() -> None:
    one = Starvation(schedule_ns=1, upstream_ns=2, wire_ns=3, serialise_ns=4)
    assert one.total_ns == 10
    assert (one + one) - one == one
