"""The schema gate on real models: each is loaded in a process of its own and asked what the champion was asked."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from deployments.artifact import digest
from deployments.target import Traffic
from tasks.context import Contender, Context
from tasks.registry import Registered
from tasks.score import ScoreError, ask
from tasks.settings import Mistake, Settings
from tasks.validate import schema
from tests.fakes import FakeTarget
from tests.flows.conftest import COLUMNS, label, pipeline, rows
from validations.gates import Schema
from validations.verdict import Evidence, Outcome, judge


def save(path, *, seed=0, frame=None, outcome=label, encoder="ignore", example=2, answers="predict_proba", **how):
    """A scikit-learn model as MLflow saves it; its signature says that it answers probabilities."""
    import mlflow.sklearn
    from mlflow.models import infer_signature

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    frame = rows(400, seed) if frame is None else frame
    fitted = pipeline(encoder).fit(frame, outcome(frame))
    mlflow.sklearn.save_model(
        fitted,
        path,
        serialization_format="skops",
        pyfunc_predict_fn=answers,
        signature=infer_signature(frame, fitted.predict_proba(frame)),
        input_example=frame.head(example) if example else None,
        pip_requirements=["mlflow", "scikit-learn"],
        **how,
    )
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The champion and its challengers, by name: a path each."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "champion": {},
        "retrained": {"seed": 1},
        "swapped": {"seed": 1, "outcome": lambda frame: 1 - label(frame)},
        "three classes": {"outcome": lambda frame: label(frame) + (frame["x"] > 1)},
        "labels": {"answers": "predict"},
        "strict": {"frame": rows(400, 1, segments="a"), "encoder": "error"},
        "no example": {"example": 0},
        "declares": {"metadata": {"classes": ["no", "yes"]}},
        "declares otherwise": {"seed": 1, "metadata": {"classes": ["yes", "no"]}},
        "declares badly": {"seed": 1, "metadata": {"classes": "yes, no"}},
    }
    return {name: save(folder / name.replace(" ", "-"), **how) for name, how in made.items()}


def contender(path, number):
    found = digest(path)
    return Contender(Registered("flights", number, None, {}), path, found, found)


def judged(champion, challenger, tmp_path, live=(), **policy):
    """The gate's verdict, with what it saw; `live` are bodies of requests that the champion has answered."""
    target = FakeTarget()
    old, new = contender(champion, "1"), contender(challenger, "2")
    fence = target.lease("flights", "test")
    target.deploy(old.version("local"), fence)
    target.route(Traffic("flights", "1"), fence)
    for body in live:
        target.send("flights", json.dumps(body).encode())
    context = Context(
        id="p",
        model="flights",
        settings=Settings(home=tmp_path),
        target=target,
        fence=fence,
        base=tmp_path,
        folder=tmp_path,
        champion=old,
        challenger=new,
        previous=None,
    )
    gate = Schema.model_validate(policy)
    seen = schema.fn(context, gate)
    return judge("schema", gate.bounds(), Evidence(measurements=seen.measurements, note=seen.note)), seen


def split(frame):
    return {"dataframe_split": {"columns": COLUMNS, "data": frame[COLUMNS].to_numpy().tolist()}}


LIVE = [split(rows(1, seed)) for seed in range(60)]


def test_a_retrained_model_passes(models, tmp_path):
    """Other probabilities for the same requests are no broken contract."""
    verdict, seen = judged(models["champion"], models["retrained"], tmp_path, LIVE)
    assert verdict.outcome is Outcome.PASSED, verdict.why
    assert "asked the input example and 60 live requests" in seen.note


@pytest.mark.parametrize(
    ("challenger", "metric", "says"),
    [
        ("labels", "breaking_answers", "a list in the champion's answers and a number in the challenger's: convert"),
        ("strict", "breaking_answers", "does not answer 1 of 1 requests that the champion answers"),
        ("three classes", "breaking_changes", "tensor of float64 (-1, 3)"),
    ],
)
def test_an_example_shows_another_form(models, tmp_path, challenger, metric, says):
    """The champion's example alone shows labels for probabilities, a class more, and requests that are refused."""
    verdict, _ = judged(models["champion"], models[challenger], tmp_path)
    assert verdict.outcome is Outcome.FAILED
    assert verdict.decisive.metric == metric
    assert says in verdict.why


def test_live_requests_show_swapped_classes(models, tmp_path):
    """Live rows show that the columns of probabilities changed places; without them two rows prove nothing."""
    verdict, _ = judged(models["champion"], models["swapped"], tmp_path, LIVE)
    assert verdict.outcome is Outcome.FAILED
    assert "'0' stands at column 1, '1' stands at column 0" in verdict.why
    verdict, seen = judged(models["champion"], models["swapped"], tmp_path, LIVE, live_sample=0)
    assert verdict.outcome is Outcome.PASSED, verdict.why
    assert "0 live requests" in seen.note


def test_declared_classes_are_compared(models, tmp_path):
    """Labels declared in another order break, before anything is asked; what is no list of labels is told."""
    verdict, _ = judged(models["declares"], models["declares otherwise"], tmp_path)
    assert (verdict.outcome, verdict.decisive.metric) == (Outcome.FAILED, "breaking_changes")
    assert "order them as the champion's" in verdict.why
    with pytest.raises(Mistake, match=r"the challenger's metadata .*: give a list"):
        judged(models["declares"], models["declares badly"], tmp_path)


def test_nothing_to_ask_is_said_and_never_taken_for_asked(models, tmp_path):
    """Without example and traffic signatures alone decide, in so many words; a policy that insists gets no pass."""
    verdict, seen = judged(models["no example"], models["retrained"], tmp_path)
    assert verdict.outcome is Outcome.PASSED
    assert "nothing was asked" in seen.note
    assert "nothing was asked" in str(verdict.checks[1])
    verdict, seen = judged(models["no example"], models["retrained"], tmp_path, checks={"breaking_answers": {"max": 0}})
    assert verdict.outcome is Outcome.ERRORED
    assert verdict.why.startswith("nothing was asked: log the champion with")


def test_a_champion_that_answers_nothing_is_an_error(models, tmp_path):
    """Where the champion itself refuses every request there is nothing to compare with: one line, and no pass."""
    odd = [{"dataframe_split": {"columns": ["z"], "data": [[1]]}}]
    with pytest.raises(Mistake, match=r"the champion itself answers none of 1 requests \(Model is missing inputs"):
        judged(models["no example"], models["retrained"], tmp_path, odd)


def test_what_is_not_as_registered_is_not_loaded(models, tmp_path):
    """An artifact with another digest, or with a pickle, is never asked: the integrity gate says why."""
    path = shutil.copytree(models["retrained"], tmp_path / "changed")
    (path / "extra.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(Mistake, match="put the gate `integrity` first"):
        judged(models["champion"], path, tmp_path)


def test_a_challenger_that_does_not_load_breaks(models, tmp_path):
    """A model that cannot be loaded answers nothing that the champion answers."""
    path = shutil.copytree(models["retrained"], tmp_path / "broken")
    text = (path / "MLmodel").read_text()
    (path / "MLmodel").write_text(text.replace("loader_module: mlflow.sklearn", "loader_module: mlflow.nowhere"))
    verdict, _ = judged(models["champion"], path, tmp_path)
    assert verdict.outcome is Outcome.FAILED
    assert "nowhere" in verdict.why


def test_asking_tells_labels_and_reasons(models):
    """Answers come as JSON text with the model's own labels beside them, and a refusal as the line that says why."""
    bodies = [json.dumps(body) for body in (split(rows(2)), {"dataframe_split": {"columns": ["x"], "data": [[1.5]]}})]
    asked = ask(models["champion"], bodies)
    assert asked.classes == (0, 1)
    (answer, fine), (none, why) = asked.replies
    assert fine == none == ""
    assert len(json.loads(answer)["predictions"]) == 2
    assert "Model is missing inputs" in why
    strict = ask(models["strict"], [json.dumps(split(rows(20)))]).replies[0][1]
    assert "Found unknown categories" in strict
    assert "\n" not in why + strict
    with pytest.raises(ScoreError, match="nowhere"):
        ask(Path("nowhere"), bodies)
