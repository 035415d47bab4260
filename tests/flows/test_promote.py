"""Promotions on a real stack: each ends where it should, and traffic and registry agree afterwards."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import cli
from tasks import history, registry
from tasks.settings import Mistake
from tests.flows.conftest import COLUMNS, Maker, label, live, pipeline, promote, rollback, rows, take_down

INTEGRITY = {"kind": "integrity"}
SHADOW = {"kind": "shadow", "min_sample": 60, "bursts": "none", "labelled": {"label_accuracy": {"min": 0.5}}}
CANARY = {
    "kind": "canary",
    "weights": [50],
    "min_sample": 40,
    "bursts": "none",
    "max": "60s",
    "checks": {"error_rate": {"max": 0.15}},
}
Policy = Callable[..., Path]


def ask(target: Any, model: str, path: str = "") -> httpx.Response:
    body = {"dataframe_split": {"columns": COLUMNS, "data": [[0.1, 0.2, "a"]]}}
    return httpx.post(f"{target.gateway(model)}{path}/invocations", json=body, timeout=30)


def crown(maker: Maker, policy: Policy) -> str:
    """A first champion, by integrity alone."""
    number = maker.version()
    result = promote(model=maker.model, policy=str(policy(INTEGRITY, name="first")), version=number)
    assert result["phase"] == "promoted", result
    return number


@pytest.fixture(scope="module")
def reigns(settings: Any) -> Iterator[list[Maker]]:
    made: list[Maker] = []
    yield made
    for maker in made:
        take_down(maker.model)


@pytest.fixture
def reigning(stack: Any, settings: Any, reigns: list[Maker], tmp_path: Path) -> Maker:
    """A model with one version, which reigns; made anew after a test that left it otherwise."""
    if reigns:
        model = reigns[-1].model
        if registry.aliased(model, "champion") == "1" and set(stack.deployed(model)) == {"1"}:
            return reigns[-1]
    maker = Maker(f"reigning-{len(reigns)}", settings.mlflow)
    reigns.append(maker)
    path = tmp_path / "reigning.yaml"
    path.write_text(json.dumps({"version": 1, "model": maker.model, "gates": [INTEGRITY]}))
    assert promote(model=maker.model, policy=str(path), version=maker.version())["phase"] == "promoted"
    return maker


@pytest.fixture
def maker(maker: Maker, request: pytest.FixtureRequest) -> Maker:
    """Tests that ask for the `champion` share its model, since each leaves it in its place; others have their own."""
    shared: Maker = request.getfixturevalue("reigning") if "champion" in request.fixturenames else maker
    return shared


@pytest.fixture
def champion(maker: Maker) -> str:
    return str(registry.aliased(maker.model, "champion"))


def stage(model: str, number: str) -> str:
    return str(registry.client().get_model_version(model, number).current_stage)


def tags(model: str, number: str) -> dict[str, str]:
    return dict(registry.client().get_model_version(model, number).tags)


def test_a_good_challenger_goes_all_the_way(
    stack: Any, maker: Maker, policy: Policy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through every gate: then traffic, aliases and stages name the challenger, and the way back is warm."""
    champion = crown(maker, policy)
    challenger = maker.version(seed=1)
    held_out = rows(600, 5)
    held_out.assign(late=label(held_out)).to_parquet(tmp_path / "held-out.parquet")
    wide = {"p50_ratio": {"max": 50}, "error_rate": {"max": 0.2}}
    path = policy(
        INTEGRITY,
        {"kind": "schema"},
        {"kind": "features", "live_sample": 50},
        {
            "kind": "quality",
            "data": "held-out.parquet",
            "label": "late",
            "checks": {"roc_auc_delta": {"min": -0.05}},
        },
        {
            **SHADOW,
            "slices": ["segment"],
            "min_slice": 20,
            "tolerances": {"*": {"abs": 0.2}},
            "checks": {
                "disagreement": {"max": 0.3},
                "slice_disagreement": {"max": 0.5},
                "error_rate": {"max": 0.2},
            },
        },
        {"kind": "load", "rate": "20/s", "run_time": "6s", "min_sample": 50, "checks": wide},
        {**CANARY, "weights": [20, 60], "checks": wide},
        {"kind": "watch", "run_time": "4s", "min_sample": 20, "bursts": "none", "checks": {"error_rate": {"max": 0.3}}},
    )
    with live(stack, maker.model, tmp_path) as traffic:
        result = promote(model=maker.model, policy=str(path), version=challenger)
        answered = traffic.stop()
    assert result["phase"] == "promoted", result
    assert answered.failed == 0
    assert ask(stack, maker.model).headers["x-model-version"] == challenger
    assert ask(stack, maker.model, f"/v/{champion}").headers["x-model-version"] == champion
    assert registry.aliased(maker.model, "champion") == challenger
    assert registry.aliased(maker.model, "previous") == champion
    assert registry.aliased(maker.model, "challenger") is None
    assert (stage(maker.model, challenger), stage(maker.model, champion)) == ("Production", "Archived")
    assert tags(maker.model, challenger)["titleshot.phase"] == "promoted"

    entry = history.entry(result["promotion"])
    stored = history.stored(entry.run_id)
    steps = [v.step for v in stored.verdicts]
    assert steps == [s.name for s in stored.plan]
    assert stored.phase.value == entry.phase == "promoted"
    page = history.fetch(entry, "report/report.html", tmp_path).read_text()
    assert page.count("<svg") >= 6
    assert "<script" not in page
    assert "src=" not in page

    # The same evidence, judged again: by its own policy, by one that asks for more, and with labels that came later.
    name = result["promotion"]
    assert cli.run(["replay", name]) == 0
    strict = policy({**SHADOW, "checks": {"error_rate": {"max": 0.0001}}}, name="strict")
    capfd.readouterr()
    assert cli.run(["replay", maker.model, "--policy", str(strict), "--json"]) == 0
    again = {one["id"]: one for one in json.loads(capfd.readouterr().out)}
    assert again[name]["otherwise"]
    assert again[name]["replayed"]["steps"][-1]["verdict"]["outcome"] == "inconclusive"
    pairs = history.fetch(entry, "evidence/shadow-pairs.jsonl", tmp_path).read_text().splitlines()
    truth = [f"{json.loads(line)['id']},{int(json.loads(line)['challenger'][0][1] > 0.5)}" for line in pairs]
    (tmp_path / "labels.csv").write_text("\n".join(["request_id,label", *truth]) + "\n")
    assert cli.run(["labels", name, str(tmp_path / "labels.csv"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["checks"][0]["measured"]["value"] == 1
    # What it would need by now: the traffic of the last hour is known.
    assert cli.run(["plan", maker.model, "--policy", str(path), "--json"]) in (0, 3)
    planned = {step["step"]: step for step in json.loads(capfd.readouterr().out)["steps"]}
    assert planned["canary 60%"]["seconds"] > 0
    assert planned["promote"]["last_time"] > 0

    # The operator changes their mind: one call, and everything is as it was, the version quarantined.
    back = rollback(model=maker.model, reason="the night shift says so")
    assert back["phase"] == "rolled back", back
    assert ask(stack, maker.model).headers["x-model-version"] == champion
    assert registry.aliased(maker.model, "champion") == champion
    assert registry.aliased(maker.model, "previous") == challenger
    assert (stage(maker.model, champion), stage(maker.model, challenger)) == ("Production", "Archived")
    with pytest.raises(Mistake, match=r"quarantined.*the night shift says so"):
        promote(model=maker.model, policy=str(path), version=challenger)
    kinds = [entry.kind for entry in history.entries(maker.model)]
    assert kinds == ["rollback", "promotion", "promotion"]


def test_a_breaking_schema_is_rejected(stack: Any, maker: Maker, champion: str, policy: Policy) -> None:
    """A column that live requests do not carry: rejected in words, a completed run, nothing deployed."""
    frame = rows(300).assign(delay=1.5)
    challenger = maker.version(frame=frame)
    path = policy(INTEGRITY, {"kind": "schema"}, CANARY)
    result = promote(model=maker.model, policy=str(path), version=challenger, return_state=True)
    assert result.is_completed()
    outcome = result.result()
    assert (outcome["phase"], outcome["step"]) == ("rejected", "schema")
    assert "delay" in outcome["why"]
    assert registry.aliased(maker.model, "champion") == champion
    assert set(stack.deployed(maker.model)) == {champion}
    assert tags(maker.model, challenger)["titleshot.phase"] == "rejected"
    with pytest.raises(Mistake, match=r"quarantined.*delay.*--again"):
        promote(model=maker.model, policy=str(path), version=challenger)
    again = promote(model=maker.model, policy=str(path), version=challenger, again=True)
    assert again["phase"] == "rejected"
    # The same artifact under a new number is the same artifact.
    version = registry.client().get_model_version(maker.model, challenger)
    logged = json.loads(json.dumps(version.source)).split("/")[-1]
    twin = maker.registered(version.source, version.run_id, logged)
    with pytest.raises(Mistake, match="quarantined"):
        promote(model=maker.model, policy=str(path), version=twin)


def test_a_failing_challenger_is_rolled_back_and_nobody_notices(
    stack: Any, maker: Maker, champion: str, policy: Policy, tmp_path: Path
) -> None:
    """It raises on a category that training never saw: the canary sees it, the clients do not."""
    challenger = maker.version(model=pipeline(handle_unknown="error"), seed=2)
    with live(stack, maker.model, tmp_path, segments="abc") as traffic:
        result = promote(model=maker.model, policy=str(policy(INTEGRITY, CANARY)), version=challenger)
        answered = traffic.stop()
    assert (result["phase"], result["step"]) == ("rolled back", "canary 50%"), result
    assert "error_" in result["why"]
    assert answered.sent > 20
    assert answered.failed == 0
    assert registry.aliased(maker.model, "champion") == champion
    assert set(stack.deployed(maker.model)) == {champion}
    assert stage(maker.model, challenger) == "None"


def test_a_regression_after_the_promotion_brings_the_champion_back(
    stack: Any, maker: Maker, champion: str, policy: Policy, tmp_path: Path
) -> None:
    """With a watch and no canary the regression is seen after the cut-over, and undone, alias and all."""
    challenger = maker.version(model=pipeline(handle_unknown="error"), seed=3)
    checks = {"error_rate": {"max": 0.1}}
    watch = {"kind": "watch", "run_time": "60s", "min_sample": 40, "bursts": "none", "checks": checks}
    with live(stack, maker.model, tmp_path, segments="abc") as traffic:
        result = promote(model=maker.model, policy=str(policy(INTEGRITY, watch)), version=challenger)
        answered = traffic.stop()
    assert (result["phase"], result["step"]) == ("rolled back", "watch"), result
    assert answered.failed == 0
    assert registry.aliased(maker.model, "champion") == champion
    assert registry.aliased(maker.model, "previous") is None
    assert ask(stack, maker.model).headers["x-model-version"] == champion


def test_an_artifact_that_changed_after_admission_is_not_loaded(
    settings: Any, maker: Maker, champion: str, policy: Policy
) -> None:
    """The digest of the first admission is the version's: other bytes under its name are rejected unread."""
    challenger = maker.version(seed=4)
    registry.tag(maker.model, challenger, digest="sha256:" + "0" * 64)
    result = promote(model=maker.model, policy=str(policy(INTEGRITY, CANARY)), version=challenger)
    assert (result["phase"], result["step"]) == ("rejected", "integrity")
    assert "digest_matches" in result["why"]
    stored = history.stored(history.entry(result["promotion"]).run_id)
    assert "answers_example" not in stored.verdicts[0].evidence.measurements


def test_what_serves_is_never_replaced_on_disk(
    stack: Any, settings: Any, maker: Maker, champion: str, policy: Policy
) -> None:
    """A promotion leaves the champion's copy alone, and other bytes from the registry do not take its place."""
    local = registry.local_path(registry.find(maker.model, champion), settings.home)
    before = (local / "MLmodel").stat().st_ino
    path, recorded, found = registry.admit(registry.find(maker.model, champion), settings.home)
    assert (path, recorded) == (local, found)
    assert (local / "MLmodel").stat().st_ino == before
    real = registry.download

    def other(version: registry.Registered, into: Path) -> Path:
        fetched = real(version, into)
        (fetched / "requirements.txt").write_text("something-else")
        return fetched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "download", other)
        path, recorded, found = registry.admit(registry.find(maker.model, champion), settings.home)
    assert path != local
    assert recorded != found
    assert (local / "MLmodel").stat().st_ino == before


def test_a_pickle_is_refused_by_name(stack: Any, maker: Maker, champion: str, policy: Policy) -> None:
    """Unsafe serialisation is found before anything loads it, and the file is named."""
    challenger = maker.version(seed=5, serialization_format="cloudpickle")
    result = promote(model=maker.model, policy=str(policy(INTEGRITY, CANARY)), version=challenger)
    assert (result["phase"], result["step"]) == ("rejected", "integrity")
    assert "model.pkl" in result["why"]


def test_a_challenger_that_never_becomes_ready_is_rejected_with_its_log(
    stack: Any, maker: Maker, champion: str, policy: Policy, tmp_path: Path
) -> None:
    """A server that cannot load its model: rejected at deploy, its log's last lines in the evidence."""
    challenger = maker.version(seed=6, serialization_format="cloudpickle", code_paths=None)
    # The artifact is admitted as it is, and is not a model: what its own server then says is the evidence.
    from deployments.artifact import digest

    found = registry.find(maker.model, challenger)
    real = registry.download

    def broken(version: registry.Registered, into: Path) -> Path:
        path = real(version, into)
        if version.number == challenger:
            (path / "model.pkl").write_bytes(b"not a pickle")
        return path

    registry.tag(maker.model, challenger, digest=digest(broken(found, tmp_path / "broken")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "download", broken)
        result = promote(model=maker.model, policy=str(policy(CANARY)), version=challenger)
    assert (result["phase"], result["step"]) == ("rejected", "deploy"), result
    stored = history.stored(history.entry(result["promotion"]).run_id)
    assert "pickle" in stored.verdicts[0].evidence.note.lower()
    assert set(stack.deployed(maker.model)) == {champion}


@pytest.mark.long
def test_an_alias_moved_by_hand_stops_the_promotion(stack: Any, maker: Maker, policy: Policy, tmp_path: Path) -> None:
    """Someone moved the champion meanwhile: the promotion refuses, says who sees what, and gives back."""
    champion = crown(maker, policy)
    other, challenger = maker.version(seed=7), maker.version(seed=8)
    real = registry.move

    def meanwhile(model: str, alias: str, to: str | None, **how: Any) -> None:
        real(model, alias, to, **how)
        if alias == "challenger":
            registry.client().set_registered_model_alias(model, "champion", other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "move", meanwhile)
        result = promote(model=maker.model, policy=str(policy(INTEGRITY)), version=challenger)
    assert result["step"] == "promote"
    assert f"names v{other}, not v{champion}" in result["why"]
    assert ask(stack, maker.model).headers["x-model-version"] == champion


def test_a_changed_verdict_is_noticed(stack: Any, maker: Maker, champion: str, policy: Policy) -> None:
    """The chain of digests breaks where somebody rewrites a verdict."""
    entry = next(one for one in history.entries(maker.model) if one.challenger == champion)
    client = registry.client()
    import mlflow.artifacts

    first = min(info.path for info in client.list_artifacts(entry.run_id, "verdicts"))
    text = mlflow.artifacts.load_text(f"runs:/{entry.run_id}/{first}")
    client.log_text(entry.run_id, text.replace('"passed"', '"failed"', 1), first)
    with pytest.raises(history.Tampered, match="was changed"):
        history.stored(entry.run_id)
    client.log_text(entry.run_id, text, first)
    assert history.stored(entry.run_id).phase.value == "promoted"
