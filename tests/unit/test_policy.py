"""The policy file: what is read is what runs, and a slip of the pen is refused with its place and its mend."""

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from validations.gates import GATES, BaseGate
from validations.policy import ROLLBACK, Policy, PolicyError, read
from validations.quiet import Quiet
from validations.traffic import Like, Pinned, Shaping
from validations.verdict import Bound
from validations.waves import Waves

GOOD = """\
version: 1
model: flight-delay
gates:
  - kind: integrity
  - kind: quality
    data: holdout.parquet
    label: late
    checks: {roc_auc_delta: {min: -0.02}}
  - kind: shadow
    checks:
      error_rate: {max: 0.01}
      disagreement: {max: 0.05}
  - kind: load
    rate: 100/s
    run_time: 1m30s
    checks: {p99_ms: {max: 150}}
  - kind: canary
    weights: [1, 5.5, 25]
    checks: {error_rate_delta: {max: 0.005}}
  - kind: watch
    run_time: 10m
    checks: {error_rate: {max: 0.005}}
"""


def test_a_policy_reads_as_it_is_written() -> None:
    """Durations and rates are read, steps are in order, and its stored form is the same policy."""
    policy = read(GOOD)
    names = [s.name for s in policy.plan()]
    assert names == [
        *("integrity", "quality", "deploy", "shadow", "load"),
        *("canary 1%", "canary 5.5%", "canary 25%", "promote", "watch"),
    ]
    assert policy.gates[3].run_time == timedelta(seconds=90)
    again = Policy.model_validate_json(policy.model_dump_json())
    assert again == policy
    assert again.digest == policy.digest


def test_comments_and_layout_do_not_change_the_digest() -> None:
    """The digest is of what the policy says, so a comment changes nothing and a bound changes it."""
    assert read("# note\n" + GOOD).digest == read(GOOD).digest
    assert read(GOOD.replace("0.05", "0.06")).digest != read(GOOD).digest


SLIPS = {
    "a typo in a word": ("    checks:\n      error", "    chekcs:\n      error", r"p\.yaml:10: gates\[2\]\.chekcs: unknown word.*did you mean 'checks'"),
    "a typo in a check": ("disagreement:", "disagrement:", "did you mean 'disagreement'"),
    "a typo in a kind": ("kind: load", "kind: laod", r":13: gates\[3\]: no such kind.*did you mean 'load'"),
    "a typo in a bound": ("{max: 150}", "{maks: 150}", r"unknown word 'maks'; did you mean 'max'"),
    "a typo at the top": ("model: f", "modle: f", "unknown word 'modle'; did you mean 'model'"),
    "an empty bound": ("{max: 150}", "{}", "bounds nothing"),
    "a crossed bound": ("{max: 150}", "{min: 2, max: 1}", "no number is at least 2"),
    "shrinking weights": ("[1, 5.5, 25]", "[5, 1]", "weights grow: 1 comes after 5"),
    "a weight too fine": ("[1, 5.5, 25]", "[1.001]", "hundredths of a percent"),
    "a weight over all": ("[1, 5.5, 25]", "[101]", "less than or equal to 100"),
    "no duration": ("10m", "10 minutes", "is no duration: write it like"),
    "a bare number of time": ("run_time: 10m", "run_time: 10", "written like 30s"),
    "no rate": ("100/s", "fast", "is no rate: write it like"),
    "a gate without checks": ("    checks: {p99_ms: {max: 150}}\n", "", "without checks proves nothing"),
    "something after the watch": ("kind: integrity", "kind: watch\n    run_time: 3s\n    checks: {error_rate: {max: 1}}", r":7: gates\[1\]: .*it is last"),
    "a hook that comes too late": ("checks: {error_rate: {max: 0.005}}", "checks: {error_rate: {max: 0.005}}\n  - kind: hook\n    command: [x]", r":23: gates\[6\]: `hook` comes after `watch`.*it is last: give it `when: after`"),
    "two steps of one name": ("kind: quality", "kind: integrity\n  - kind: quality", r":5: gates\[1\]: two steps are called 'integrity'"),
    "a step called like an action": ("kind: integrity", "kind: integrity\n    name: rollback", r":4: gates\[0\]: two steps are called 'rollback'"),
    "a name that is a path": ("kind: integrity", "kind: integrity\n    name: ../x", "name: "),
    "a bare number for a bound": ("{max: 150}", "150", r"a bound is written like \{ max: 150 \}"),
    "a live check without a sample": ("kind: integrity", "kind: features\n    live_sample: 0\n    checks: {unmet_live_expectations: {max: 0}}", "needs a `live_sample`"),
    "a mirror too fine": ("kind: shadow", "kind: shadow\n    mirror: 0.001", "mirror: "),
    "a key twice": ("version: 1", "version: 1\nversion: 1", ":2: 'version' stands here twice"),
    "another version": ("version: 1", "version: 2", "version: "),
    "not YAML": ("gates:", "gates", "not YAML"),
    "slices wanted, none named": ("disagreement: {max: 0.05}", "slice_disagreement: {max: 0.05}", "needs `slices`"),
    "a missing word": ("    data: holdout.parquet\n", "", "`data` is missing"),
    "another target": ("model: f", "target: moon\nmodel: f", "target"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_refused_in_one_line(slip: str) -> None:
    """A mistake in the file is one line that begins with the file and says what is wrong."""
    old, new, said = SLIPS[slip]
    assert old in GOOD
    with pytest.raises(PolicyError) as caught:
        read(GOOD.replace(old, new, 1), "p.yaml")
    message = str(caught.value)
    assert message.startswith("p.yaml:")
    assert "\n" not in message
    assert re.search(said, message), message


def test_an_empty_file_is_refused() -> None:
    """Nothing at all is no policy."""
    with pytest.raises(PolicyError, match="a policy is a mapping"):
        read("", "p.yaml")


def test_every_gate_and_check_is_documented() -> None:
    """docs/policy.md names every gate and every check that the policy knows."""
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    for kind, gate in GATES.items():
        assert f"`{kind}`" in page
        for metric in gate.METRICS:
            base = re.sub(r"^p\d+_", "pNN_", metric)
            assert f"`{metric}`" in page or f"`{base}`" in page or f"`{metric.removesuffix('_delta')}`" in page, metric


def test_every_word_is_documented() -> None:
    """docs/policy.md names every word of the file, of each gate and of the blocks `target`, `traffic` and `quiet`."""
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    for record in (*GATES.values(), Policy, Waves, Shaping, Pinned, Like, Quiet):
        for name, field in record.model_fields.items():
            word = field.alias or name
            if name in BaseGate.model_fields or record is Policy:
                assert f"`{word}`" in page or f"{word}:" in page, word
            else:
                assert f"`{word}`" in page, (record, word)
    assert "`rollback_s`" in page


def test_examples_of_traffic_in_the_documents_can_be_read() -> None:
    """The block in docs/policy.md is one."""
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    (block,) = re.findall(r"```yaml\n(traffic:.*?)```", page, re.DOTALL)
    traffic = read(GOOD.replace("gates:", f"{block}gates:", 1)).traffic
    assert traffic is not None
    assert [pin.version for pin in traffic.pins] == ["challenger", "3"]
    assert traffic.numbers == {"3", "2"}
    assert (traffic.sticky, traffic.fallback, traffic.limits) == ("x-user", "2", {"challenger": 20})


REGIONS = {"kind": "kserve", "waves": [["eu"], ["us", "asia"]], "on_failure": "all"}


def test_the_first_region_goes_through_all_gates_and_the_others_through_some() -> None:
    """A region's own policy has one place and its part of the gates; the file's order stays."""
    text = GOOD.replace("gates:", f"target: {json.dumps(REGIONS)}\ngates:", 1)
    policy = read(text)
    assert isinstance(policy.target, Waves)
    assert policy.target.regions == ("eu", "us", "asia")
    first, further = policy.in_region(further=False), policy.in_region(further=True)
    assert (first.target, first.gates) == ("kserve", policy.gates)
    assert {gate.kind for gate in further.gates} == {"canary", "watch"} & {gate.kind for gate in policy.gates}
    assert read(GOOD).in_region(further=True) == read(GOOD)


def test_what_goes_back_is_the_wave_or_all() -> None:
    """The latest region first; regions that have not promoted are not asked."""
    waves = Waves(waves=(("eu",), ("us", "asia")))
    assert waves.go_back("asia", ("eu", "us")) == ("us",)
    assert waves.go_back("us", ("eu",)) == ()
    everything = waves.model_copy(update={"on_failure": "all"})
    assert everything.go_back("asia", ("eu", "us")) == ("us", "eu")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("kubernets", "target: .*'local', 'kubernetes' or 'kserve'"),
        ("{waves: []}", r"target.waves: .*at least 1"),
        ("{wave: [[eu]]}", "unknown word 'wave'; did you mean 'waves'"),
        ("{waves: [[eu], [eu]]}", "the region 'eu' is in two waves"),
        ("{waves: [[EU]]}", r"target.waves\[0\]\[0\]: "),
        ("{waves: [[eu], []]}", "a wave without a region"),
        ("{waves: [[eu]], again: [load]}", "no gate of this policy is of a kind"),
    ],
)
def test_regions_that_make_no_sense_are_refused(target: str, said: str) -> None:
    """One line, with the place and the right word."""
    text = (
        "version: 1\nmodel: m\ntarget: "
        + target
        + "\ngates: [{kind: canary, weights: [5], checks: {error_rate: {max: 0.1}}}]\n"
    )
    with pytest.raises(PolicyError, match=said) as caught:
        read(text, "p.yaml")
    assert "\n" not in str(caught.value)


TRAFFIC = {
    "nothing": ("{}", r"traffic: this asks nothing: give some of pins, sticky"),
    "no mapping": ("5", r"traffic: this is a mapping of pins, sticky, limits"),
    "a typo": ("{pin: []}", r"traffic.pin: unknown word 'pin'; did you mean 'pins'"),
    "one pin without its list": ("{pins: {header: a}}", r"traffic.pins: this is a list of \{ header"),
    "a pin that is none": ("{pins: [5]}", r"traffic.pins\[0\]: this is a mapping of header, value, version"),
    "a pin to nobody": ("{pins: [{header: x-a, value: b}]}", r"`version` is missing"),
    "a typo in a pin": ("{pins: [{header: x-a, valu: b, version: 3}]}", r"unknown word 'valu'; did you mean 'value'"),
    "a typo in an alias": ("{pins: [{header: x-a, value: b, version: champoin}]}", r"did you mean 'champion'"),
    "no name of a header": ("{sticky: ':path'}", r"traffic.sticky: ':path' is no name of a request header"),
    "the gateway's header": ("{priority: {header: X-Shadow, value: b}}", r"'x-shadow' is the gateway's own header"),
    "a value that YAML turned": ("{priority: {header: x-a, value: yes}}", r"put it in quotes"),
    "a value with an end": ("{priority: {header: x-a, value: 'b '}}", r"no space at either end"),
    "two pins for one": ("{pins: [{header: x-a, value: b, version: 3}, {header: X-A, value: b, version: 4}]}", r"`x-a: b` is pinned twice, to 3 and to 4"),
    "no rate": ("{limits: {3: fast}}", r"traffic.limits\[3\]: 'fast' is no rate"),
    "a limit of nothing": ("{limits: {3: 0}}", r"greater than 0"),
    "a limit for nobody": ("{limits: {v3: 4}}", r"traffic.limits.v3: 'v3' is no version"),
    "two limits for one": ("{limits: {3: 4, '3': 5}}", r"'3' stands here twice"),
    "limits in a list": ("{limits: [3]}", r"this is a mapping of versions to rates"),
    "sticky by what nobody keeps": ("{sticky: x-request-id}", r"another for every request"),
    "the champion for a fallback": ("{fallback: champion}", r"answers what the challenger fails already"),
    "an unproven fallback": ("{fallback: challenger}", r"is not proven"),
}  # fmt: skip


@pytest.mark.parametrize("slip", TRAFFIC)
def test_traffic_that_makes_no_sense_is_refused(slip: str) -> None:
    """In one line, with its place."""
    block, said = TRAFFIC[slip]
    with pytest.raises(PolicyError, match=said) as caught:
        read(GOOD.replace("gates:", f"traffic: {block}\ngates:", 1), "p.yaml")
    assert str(caught.value).startswith("p.yaml:3: ")
    assert "\n" not in str(caught.value)


def test_traffic_is_read_and_kept() -> None:
    """Headers in small letters, versions as text, rates per second; the stored form is the same policy."""
    block = "{pins: [{header: X-Tenant, value: 7, version: 3}], limits: {3: 120/m, previous: 5}, fallback: previous}"
    policy = read(GOOD.replace("gates:", f"traffic: {block}\ngates:", 1))
    assert policy.traffic == Shaping(
        pins=(Pinned(header="x-tenant", value="7", version="3"),),
        limits={"3": 2.0, "previous": 5.0},
        fallback="previous",
    )
    assert Policy.model_validate_json(policy.model_dump_json()) == policy
    assert policy.digest != read(GOOD).digest


def test_a_rollback_is_held_to_its_time_where_the_policy_says_so() -> None:
    """`rollback_within` bounds the step `rollback`, in seconds; without a champion nothing is given back."""
    held = read(GOOD.replace("gates:", "rollback_within: 1m30s\nkeep_previous: 24h\ngates:", 1))
    assert held.keep_previous == timedelta(hours=24)
    assert held.bounds(ROLLBACK)["rollback_s"] == Bound(max=90)
    assert set(held.bounds(ROLLBACK, first=True)) == set(read(GOOD).bounds(ROLLBACK)) == {"agreement"}
    for word in ("rollback_within: 5", "keep_previous: forever"):
        with pytest.raises(PolicyError, match=r"a duration is written like|is no duration"):
            read(GOOD.replace("gates:", f"{word}\ngates:", 1))


@pytest.mark.parametrize(("written", "wanted"), [("5%", 0.05), ("0.02", 0.02), ("12.5 %", 0.125)])
def test_declared_error_rates_are_read(written: str, wanted: float) -> None:
    """As percent or as a fraction; they bound the ledger of every gate that looks again and again."""
    policy = read(GOOD.replace("gates:", f"false_rollback: {written}\ngates:", 1))
    assert policy.false_rollback == pytest.approx(wanted)
    step = next(step for step in policy.plan() if step.kind == "shadow")
    assert policy.bounds(step)["ledger"].max == pytest.approx(1 / wanted)
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize("written", ["80%", "0", "often", "true"])
def test_an_error_rate_that_promises_nothing_is_refused(written: str) -> None:
    """In one line, with its place and how to write it."""
    with pytest.raises(PolicyError, match=r"policy:3: false_promotion: .*5%"):
        read(GOOD.replace("gates:", f"false_promotion: {written}\ngates:", 1))


def test_only_the_deciding_step_of_a_canary_asks_for_the_bounds() -> None:
    """The steps before ask for ceiling and ledger; a step at 100 after it asks for all of them too."""
    policy = read(GOOD.replace("weights: [1, 5.5, 25]", "weights: [1, 25, 100]"))
    asked = {step.name: set(policy.bounds(step)) for step in policy.plan() if step.kind == "canary"}
    assert asked["canary 1%"] == {"error_ceiling", "ledger"}
    assert asked["canary 25%"] == asked["canary 100%"] == {"error_rate_delta", "error_ceiling", "ledger"}
