"""What a dry run shows, as texts to compare."""

import yaml

from deployments.local.envoy import Backend, Limits
from deployments.local.preview import Picture, differences
from deployments.target import Change, Traffic
from tasks.preview import difference

BACKENDS = (Backend("1", 18001), Backend("2", 18002))


def test_a_difference_says_where_it_is_and_what_is_new_says_all() -> None:
    """Of long texts that differ the places are shown; of what is new, gone or a single line, each line and no place."""
    long = "".join(f"{number}\n" for number in range(9))
    assert difference(Change("a", long, long.replace("4", "x"))) == [
        "@@ -3,5 +3,5 @@",
        " 2",
        " 3",
        "-4",
        "+x",
        " 5",
        " 6",
    ]
    assert difference(Change("a", "", "b\nc\n")) == ["+b", "+c"]
    assert difference(Change("a", "b\nc\n", "")) == ["-b", "-c"]
    assert difference(Change("alias champion", "v1\n", "v2\n")) == ["-v1", "+v2"]


def test_this_machines_configuration_is_shown_in_full() -> None:
    """What occurs twice is written twice: a line that refers to another place could not be compared, or understood."""
    before = Picture("flights", 8000, BACKENDS[:1], traffic=Traffic("flights", "1"))
    after = Picture("flights", 8000, BACKENDS, traffic=Traffic("flights", "1", "2", weight=500))
    changes = differences(before, after, Limits())
    assert {"gateway cluster flights-2", "gateway routes flights"} <= {one.what for one in changes}
    for one in changes:
        assert "id001" not in one.before + one.after
        assert yaml.safe_load(one.after)
