"""The command line, promotions and triggers where a model is served in several regions: two places in memory with a real
registry, and leases in two namespaces of the tests' API server."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyotp
import pytest

from deployments.target import TargetError, Traffic, Version
from flows import cli
from flows import regions as promoting
from tasks import approvers, registry, targets, triggers
from tasks.journal import Agreed, Journal, Open
from tasks.regions import Region, goes_back
from tasks.settings import QUIET, Mistake, Settings, load
from tests.contract.clients import GOOD, make_models
from tests.fakes import FakeTarget
from validations.waves import Waves

MODEL = "m"
WAVES = {"waves": [["eu"], ["us"]], "on_failure": "all"}


class Place(FakeTarget):
    """A region; `down` is why it does not answer."""

    down = ""

    def models(self) -> tuple[str, ...]:
        if self.down:
            raise TargetError(self.down)
        return super().models()

    def crown(self, name: str, number: str, previous: str | None) -> None:
        """`number` is promoted."""
        fence = self.lease(MODEL, "test")
        for one in {number, previous} - {None}:
            self.deploy(Version(MODEL, str(one), Path("nowhere"), f"sha256:{one}"), fence)
        self.route(Traffic(MODEL, number), fence)
        Journal(self, fence, f"{MODEL}-v{number}-{name}").end("promoted", number, previous, {})
        self.release(fence)
        client = registry.client()
        for alias, version in (("champion", number), ("previous", previous)):
            if version is not None:
                client.set_registered_model_alias(MODEL, f"{alias}-{name}", version)

    def begin(self) -> None:
        """A promotion begins, and goes on."""
        Journal(self, self.lease(MODEL, "somebody"), "m-v3-x").begin_rollback("3", "2", "test")

    @property
    def serves(self) -> str:
        return self._traffic[MODEL].champion


def aliases() -> dict[str, str]:
    return {name: str(number) for name, number in registry.client().get_registered_model(MODEL).aliases.items()}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's database with three versions of the model."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        client = registry.client()
        client.create_registered_model(MODEL)
        good = str(make_models(path.parent) / GOOD)
        for _ in range(3):
            client.create_model_version(MODEL, good)
    return path


@pytest.fixture
def places(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Place]:
    """Two regions where v2 has taken the place of v1, and a registry that says so."""
    for name in (*QUIET, "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.chdir(tmp_path)
    gateway = {"name": "gateway", "url": "http://127.0.0.1:1"}
    described = [{"name": name, "region": True, "gateway": gateway} for name in ("eu", "us")]
    (tmp_path / "clusters.yaml").write_text(json.dumps({"clusters": described}))
    (tmp_path / "policies").mkdir()
    canary = {"kind": "canary", "weights": [50], "min_sample": 30, "max": "60s", "checks": {"error_rate": {"max": 0.1}}}
    policy = {"version": 1, "model": MODEL, "target": WAVES, "gates": [canary]}
    (tmp_path / "policies" / "m.yaml").write_text(json.dumps(policy))
    database = f"sqlite:///{shutil.copy(empty, tmp_path)}"
    for name, value in {"HOME": tmp_path, "MLFLOW_URI": database, "PREFECT_API_URL": "http://127.0.0.1:1/api"}.items():
        monkeypatch.setenv(f"TITLESHOT_{name}", str(value))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    found = {"eu": Place(), "us": Place()}
    connect = Settings.connect  # a registry that is a file has no server that could be well
    monkeypatch.setattr(Settings, "connect", lambda self, needed=(): connect(self, ()))
    monkeypatch.setattr(targets, "Targets", lambda cluster, local: found[cluster.name])
    for name, place in found.items():
        place.crown(name, "2", "1")
    registry.client().set_registered_model_alias(MODEL, "champion", "2")
    return found


def ended(phase: str, champion: str, previous: str | None, at: float, name: str = "m-v2-x") -> Agreed:
    return Agreed(name, phase, champion, previous, {}, None, at)


def back(champion: str, previous: str, at: float) -> Agreed:
    return ended("rolled back", champion, previous, at, "m-rollback-x")


def test_what_goes_back_is_what_came_last() -> None:
    """Whatever is on its way; else the version that was promoted last; a rollback that was cut off is about what it took
    away; and what did not pass says nothing."""

    def about(*regions: tuple[str, Agreed | None]) -> str | None:
        return goes_back("m", [Region(str(index), serves, None, last) for index, (serves, last) in enumerate(regions)])

    old, new = ended("promoted", "1", None, 1), ended("promoted", "2", "1", 5)
    assert about(("2", new), ("2", new)) == "2"
    assert about(("2", new), ("1", old)) == "2"
    assert about(("2", new), ("1", ended("rejected", "1", None, 6))) == "2"
    assert about(("1", back("1", "2", 7)), ("2", new)) == "2"
    assert about(("1", back("1", "2", 7)), ("1", old)) == "2"  # nobody has it any more
    assert about(("1", ended("rejected", "1", None, 6)), ("1", old)) == "1"
    assert about(("2", ended("degraded", "2", "1", 6)), ("1", old)) == "2"
    assert about(("1", None), ("1", None)) == "1"
    under_way = Open("m-rollback-y", "m", 8, what="rollback", of="3", to="2")
    assert goes_back("m", [Region("eu", "2", None, new), Region("us", "2", under_way, new)]) == "3"


def test_a_rollback_takes_every_region_back(places: dict[str, Place], capfd: Any) -> None:
    """The newest wave first; a region that fails does not stop the others, is named, and makes the exit code non-zero;
    asked for again it is the only one that goes back. The alias champion follows once all serve the same."""
    places["us"].fail["route"] = TargetError("the gateway does not obey")
    assert cli.run(["rollback", MODEL, "--reason", "it smells"]) == 1
    told = capfd.readouterr().out
    assert told.splitlines()[0] == "m in us: did not go back: the gateway does not obey"
    assert told.splitlines()[1].startswith("m in eu: v1 is champion again")
    assert (places["eu"].serves, places["us"].serves, aliases()["champion"]) == ("1", "2", "2")
    assert cli.run(["rollback", MODEL, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(one["region"], one["phase"], one["why"]) for one in found["regions"]][1] == (
        "eu",
        "",
        "stays: it serves v1",
    )
    assert (places["eu"].serves, places["us"].serves) == ("1", "1")
    assert {name: aliases()[name] for name in ("champion", "champion-eu", "champion-us", "previous")} == {
        "champion": "1",
        "champion-eu": "1",
        "champion-us": "1",
        "previous": "2",
    }
    # Once more would bring back what was just taken away: that is for who names a region.
    assert cli.run(["rollback", MODEL]) == 2
    assert "(they serve: eu v1, us v1): name one" in capfd.readouterr().err
    assert cli.run(["rollback", MODEL, "--region", "us"]) == 0
    assert capfd.readouterr().out.startswith("m in us: v2 is champion again")
    assert (places["eu"].serves, places["us"].serves, aliases()["champion"]) == ("1", "2", "1")
    assert cli.run(["history", MODEL, "--region", "eu"]) == 0
    assert [" in eu " in line for line in capfd.readouterr().out.splitlines()[::2]] == [True]


def test_a_region_that_does_not_answer_keeps_no_other_from_going_back(places: dict[str, Place], capfd: Any) -> None:
    """It is named with what it said; a second try while it is silent changes nothing elsewhere."""
    places["us"].down = "us: no answer"
    for _ in range(2):
        assert cli.run(["rollback", MODEL]) == 1
        assert "m in us: did not go back: us: no answer" in capfd.readouterr().out
        assert (places["eu"].serves, places["us"].serves) == ("1", "2")


def test_what_cannot_mean_all_regions_names_them(places: dict[str, Place], capfd: Any) -> None:
    """Looking shows every region; changing asks for one; an unknown one is refused with those that there are."""
    for words in (["serve", MODEL, "--warm", "2"], ["route", MODEL, "--sticky", "x-user"]):
        assert cli.run(words) == 2
        assert "m is served in eu, us: say which is meant with --region" in capfd.readouterr().err
    for words in (["serve", MODEL], ["route", MODEL]):
        assert cli.run(words) == 0
        told = capfd.readouterr().out
        assert "region eu\n" in told
        assert "region us\n" in told
    assert cli.run(["serve", MODEL, "--json"]) == 0
    assert [one["region"] for one in json.loads(capfd.readouterr().out)] == ["eu", "us"]
    assert cli.run(["route", MODEL, "--sticky", "x-user", "--region", "us"]) == 0
    assert [place._traffic[MODEL].shape.sticky for place in places.values()] == [None, "x-user"]
    capfd.readouterr()
    for verb in (["rollback", MODEL], ["serve", MODEL], ["route", MODEL], ["status"], ["history", MODEL], ["approve"]):
        assert cli.run([*verb, "--region", "uss"]) == 2
        told = capfd.readouterr().err
        assert "there is no region 'uss'" in told
        assert "did you mean 'us'" in told
        assert "(there are: eu, us)" in told
    assert load().region is None


def test_a_model_is_busy_where_any_of_its_regions_is(places: dict[str, Place], settings: Settings) -> None:
    """What is due waits while another one is under way in the second region, and while that cannot be known."""
    places["us"].begin()
    (skipped,) = triggers.due(settings, FakeTarget()).skipped
    assert skipped.why == "m-v3-x is under way: others come later"
    places["us"].journal = lambda model: (_ for _ in ()).throw(TargetError("us: no answer"))  # type: ignore[method-assign]
    (skipped,) = triggers.due(settings, FakeTarget()).skipped
    assert "is not known: us: no answer" in skipped.why


@pytest.fixture
def settings(places: dict[str, Place]) -> Settings:
    return load()


def test_what_went_back_meanwhile_stays_so(places: dict[str, Place], settings: Settings) -> None:
    """Where the second region does not pass, a first one that somebody has taken back already is not taken back once
    more, to what it went back from; and where the second passes, the alias champion does not name what not all have."""
    waves = Waves.model_validate(WAVES)

    def promote(ends: str) -> dict[str, Any]:
        def one(further: bool, others: tuple[str, ...]) -> dict[str, Any]:
            name = load().region or ""
            assert others == (("eu",) if further else ("us",))
            if not further or ends == "promoted":
                places[name].crown(name, "3", "2")
            if further:
                assert cli.run(["rollback", MODEL, "--region", "eu"]) == 0
            return {"phase": ends if further else "promoted", "promotion": f"m-v3-{name}", "why": ""}

        return promoting.promote(waves, MODEL, "3", one)

    result = promote("promoted")
    assert (result["phase"], "eu went back" in result["why"]) == ("rolled back", True)
    assert (places["eu"].serves, places["us"].serves, aliases()["champion"]) == ("2", "3", "2")
    places["us"].crown("us", "2", "1")
    result = promote("rolled back")
    assert [one["phase"] for one in result["regions"]] == ["rolled back", "rolled back"]
    assert (places["eu"].serves, places["us"].serves) == ("2", "2")


def test_of_two_that_begin_in_two_regions_no_two_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds its own region's lease before it looks at the other's: leases of a real API's kind in two namespaces."""
    from tests.cluster.apiserver import ApiServer

    with ApiServer() as api:
        file = str(api.kubeconfig(tmp_path / "config"))
        gateway = {"name": "gateway", "url": "http://127.0.0.1:1"}
        common = {"region": True, "kubeconfig": file, "gateway": gateway}
        described = [{"name": name, "namespace": f"in-{name}", **common} for name in ("eu", "us")]
        (tmp_path / "clusters.yaml").write_text(json.dumps({"clusters": described}))
        monkeypatch.setenv("TITLESHOT_HOME", str(tmp_path))
        from tasks.agreement import leased
        from tasks.settings import within
        from tests.cluster.rest import Api

        for name in ("in-eu", "in-us"):
            made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            Api(Path(file)).create(made)

        def at(name: str) -> Any:
            with within(name):
                target = targets.settings_target(load())
                assert isinstance(target, targets.Targets)
                target._known[MODEL] = target.remote("kubernetes")
                return target

        there = {name: at(name) for name in ("eu", "us")}
        monkeypatch.setattr(promoting, "settings_target", lambda settings: there[settings.region])
        together = threading.Barrier(2, timeout=20)

        def begin(name: str, other: str) -> str:
            together.wait()
            with leased(there[name], MODEL, f"m-v-{name}"):
                found = promoting.busy(MODEL, (other,))
                together.wait()
                return found

        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                told = list(pool.map(begin, ("eu", "us"), ("us", "eu")))
                assert any("m is held by m-v-" in why for why in told), told
        assert (promoting.busy(MODEL, ("eu", "us"))) == ""


def test_an_unknown_region_in_the_waves_is_refused(places: dict[str, Place], settings: Settings) -> None:
    """Before any region is touched."""
    waves = Waves.model_validate({"waves": [["eu"], ["asia"]]})
    with pytest.raises(Mistake, match=r"there is no region 'asia' .*\(there are: eu, us\)"):
        promoting.promote(waves, MODEL, "3", lambda further, others: pytest.fail("it was touched"))


def test_people_decide_in_each_region(
    places: dict[str, Place], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promotion that waits in the first region is gone on with by what asked for it, its policy in no folder: the
    second region asks anew, and knows who asked. Meanwhile no other one begins in the first, and nothing is touched."""
    from flows import approval, promote

    (tmp_path / "policies" / "m.yaml").unlink()
    ask = {"kind": "approval", "approvers": ["ana", "bo"]}
    policy = {"version": 1, "model": MODEL, "target": {**WAVES, "again": ["approval"]}, "gates": [ask]}
    (file := tmp_path / "elsewhere.yaml").write_text(json.dumps(policy))
    monkeypatch.setattr(promote, "choose", lambda target, model, kind: None)
    secret = approvers.secret_of(approvers.enrol(settings.home, "ana", datetime.now(UTC)))
    told = list[str]()

    def form(settings: Settings, waiting: approval.Awaiting) -> approval.Given:
        asked, now = waiting.asked, datetime.now(UTC)
        told.append(f"{asked.region} {asked.round} {asked.requester} {places['eu'].serves}{places['us'].serves}")
        assert f"in the region **{asked.region}**" in waiting.text
        assert cli.run(["approve", "--region", asked.region]) == 0
        busy = rf"{asked.subject.promotion} is (awaiting approval|under way in the region us)"
        with monkeypatch.context() as other:
            other.setattr(approval, "own_run", lambda: None)
            with pytest.raises(Mistake, match=busy):
                promote.run(promote.Asks(MODEL, file, "1"))
        if len(told) == 2:
            raise TimeoutError  # as a run is suspended: it goes on in another process
        code = pyotp.TOTP(secret).at(now, counter_offset=min(1, len(told) - 1))
        return approval.Given(asked, approval.Form(decision="approve", approver="ana", code=code), now)

    waits = promote.run(promote.Asks(MODEL, file, "3", "bo"))
    assert waits["phase"] == "awaiting approval"
    # As the worker does, which is told the promotion's name and nothing else.
    monkeypatch.setattr(approval, "can_suspend", lambda: True)
    monkeypatch.setattr(approval, "wait_for_form", form)
    monkeypatch.setattr(approval, "own_run", lambda: "one run")
    monkeypatch.setattr(promote, "flow_run_tags", lambda: {"flow_run": "one run"})
    with pytest.raises(TimeoutError):
        promote.run(promote.Asks(MODEL, promotion=waits["promotion"]))
    told.append("resumed")
    result = promote.run(promote.Asks(MODEL, promotion=waits["promotion"]))
    assert (result["phase"], [one["phase"] for one in result["regions"]]) == ("promoted", ["promoted", "promoted"])
    assert told == ["eu 1 bo 22", "us 1 bo 32", "resumed", "us 1 bo 32"]
    assert {aliases()[name] for name in ("champion", "champion-eu", "champion-us")} == {"3"}
