"""The policy's words about traffic as the target's shape: aliases become whoever they name."""

from deployments.target import Limit, Match, Pin, Shape
from tasks.shaping import shape
from validations.traffic import Like, Pinned, Shaping

ASKED = Shaping(
    pins=(
        Pinned(header="x-tester", value="yes", version="challenger"),
        Pinned(header="x-tenant", value="acme", version="3"),
        Pinned(header="x-region", value="eu", version="previous"),
    ),
    sticky="x-user",
    limits={"challenger": 20.0, "5": 8.0, "previous": 3.0},
    priority=Like(header="x-class", value="gold"),
    fallback="2",
)


def test_a_policy_without_the_block_asks_nothing() -> None:
    """Then what is in force stays."""
    assert shape(None, {"champion": "4"}) is None


def test_aliases_become_versions() -> None:
    """Pins keep their order, and of two limits that come to speak of one version the lower one holds."""
    assert shape(ASKED, {"champion": "4", "challenger": "5", "previous": "1"}) == Shape(
        pins=(
            Pin(Match("x-tester", "yes"), "5"),
            Pin(Match("x-tenant", "acme"), "3"),
            Pin(Match("x-region", "eu"), "1"),
        ),
        sticky="x-user",
        limits=(Limit("5", 8.0), Limit("1", 3.0)),
        priority=Match("x-class", "gold"),
        fallback="2",
    )


def test_what_speaks_of_nobody_is_left_out() -> None:
    """Between promotions nobody is the challenger: testers go where all others do."""
    found = shape(ASKED, {"champion": "5", "challenger": None})
    assert found is not None
    assert [pin.version for pin in found.pins] == ["3"]
    assert found.limits == (Limit("5", 8.0),)
    late = shape(Shaping(fallback="previous"), {"champion": "5"})
    assert late == Shape()
