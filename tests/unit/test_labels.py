"""Labels that come after the fact: joined with the kept pairs of a shadow, they say which model was right."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.labels import read
from tasks.settings import Mistake
from validations.agreement import Pairing
from validations.labels import Pair, join, measurements, read_pairs
from validations.verdict import Bound, Outcome


def pairs(*answers):
    """One pair of single-row answers each, with the ids 0, 1, 2, ..."""
    return [Pair(str(at), [one], [two]) for at, (one, two) in enumerate(answers)]


def joined(answers, labels, kind="auto"):
    return join(pairs(*answers), {str(at): label for at, label in enumerate(labels)}, kind)


def test_a_shadow_is_judged_again_by_its_kept_pairs():
    """What a pairing kept goes through JSON lines and joins with labels by request id."""
    pairing = Pairing(keep_pairs=3)
    for at, (one, two) in enumerate([(0.9, 0.2), (0.1, 0.1), (0.8, 0.9), (0.5, 0.5)]):
        for side, p in (("champion", one), ("challenger", two)):
            pairing.add(side, f"r{at}", 200, json.dumps({"predictions": [p]}).encode())
    lines = list(pairing.kept())
    assert lines[0] == '{"id":"r0","champion":[0.9],"challenger":[0.2]}'
    found = join(read_pairs(lines), {"r2": "1", "r0": "1", "elsewhere": "0"})
    assert (found.kind, found.unknown, found.unlabelled) == ("probability", 1, 1)
    assert found.hits.tolist() == [0, 1]
    assert found.gains.tolist() == [-1, 0]
    assert found.losses == pytest.approx([0.64 - 0.01, 0.01 - 0.04])


@pytest.mark.parametrize(
    ("answers", "labels", "kind", "hits", "losses"),
    [
        ([("a", "b")], ["a"], "class", [0], [1]),
        ([(" a", "b")], ["b "], "class", [1], [-1]),
        ([(True, False)], ["true"], "class", [0], [1]),
        ([(3, 4), (7, 7)], ["4", 7.0], "class", [1, 1], [-1, 0]),
        ([(1, 0)], [0], "probability", [1], [-1]),
        ([(0.5, 0.4)], [True], "probability", [0], [0.36 - 0.25]),
        ([([0.2, 0.8], [0.6, 0.4])], [1], "probability", [0], [0.36 - 0.04]),
        ([({"a": 0.2, "b": 0.8}, {"a": 0.6, "b": 0.4})], ["a"], "probability", [1], [0.16 - 0.64]),
        ([([0.2, 0.8], [0.6, 0.4])], ["unheard of"], "probability", [0], [0]),
        ([(10.5, 12.5)], [11.5], "number", [], [0]),
        ([(10.0, 11.0)], ["12.0"], "number", [], [-0.5]),
        ([(11.5, 11.5), (2.0, 3.0)], [11.5, 2.0], "number", [], [0, 1]),
        ([("a", None), ("b", "b")], ["a", "b"], "class", [0, 1], [1, 0]),
        ([(1.5, None), (2.5, 1.5)], [2.0, 2.0], "number", [], [1, 0]),
        ([(0.5, "gibberish")], [1], "class", [0], [0]),
    ],
)
def test_predictions_are_scored_by_their_kind(answers, labels, kind, hits, losses):
    """Classes by equality, probabilities by Brier's loss and what is likeliest, numbers by whose error is smaller."""
    found = joined(answers, labels)
    assert found.kind == kind
    assert found.hits.tolist() == hits
    assert found.losses.tolist() == pytest.approx(losses)


def test_the_kind_can_be_named():
    """What looks like a probability can be a class or a number."""
    assert joined([(1, 0)], [1], "number").losses.tolist() == [1]
    assert joined([([0.4, 0.6], [0.6, 0.4])], [1], "class").losses.tolist() == [1]
    with pytest.raises(ValueError, match="label_kind"):
        joined([("a", "b")], ["a"], "number")


def test_a_challenger_without_an_answer_was_wrong():
    """A missing answer is as wrong as can be, for the challenger as for the champion; never left out."""
    found = join([Pair("a", [1], None), Pair("b", None, [1]), Pair("c", None, None)], {"a": 1, "b": 1, "c": 1})
    assert found.hits.tolist() == [0, 1, 0]
    assert found.gains.tolist() == [-1, 1, 0]
    assert found.losses.tolist() == [1, -1, 0]


def test_a_request_of_several_rows_counts_once():
    """Its label is a list, also as text, and its score the mean; a list of another length is counted, not joined."""
    three = [Pair("a", ["x", "y"], ["x", "z"]), Pair("b", ["x"], ["x"]), Pair("c", ["x", "x"], ["y", "x"])]
    found = join(three, {"a": '["x", "z"]', "b": ["x", "y"], "c": ["x", "x"]})
    assert found.misfits == 1
    assert found.hits.tolist() == [1, 0.5]
    assert found.losses.tolist() == [-0.5, 0.5]


@given(
    st.lists(
        st.tuples(
            *(st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.sampled_from(["a", "1", ""])) for _ in range(2))
        ),
        min_size=1,
    ),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_scores_stay_within_their_range(answers, data):
    """Whatever was answered and whatever the label: shares from 0 to 1, differences from -1 to 1, an interval around."""
    labels = data.draw(
        st.lists(
            st.one_of(st.floats(), st.integers(-5, 5), st.sampled_from(["a", "1"])),
            min_size=len(answers),
            max_size=len(answers),
        )
    )
    try:
        found = joined(answers, labels)
    except ValueError:
        return
    assert ((found.hits >= 0) & (found.hits <= 1)).all()
    assert (np.abs(found.losses) <= 1).all()
    for m in measurements(found, 0.05, 0.05).values():
        assert m.low <= m.value <= m.high


def test_the_interval_says_who_was_right():
    """A challenger that is right as often passes, one that is wrong 10 % more often fails, at any moment."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 5000).tolist()
    right = [[t if random.random() < share else 1 - t for t in truth] for share in (0.9, 0.9, 0.8)]
    outcomes = []
    for challenger in right[1:]:
        m = measurements(joined(list(zip(right[0], challenger, strict=True)), truth), 0.05, 0.05)
        outcomes.append(
            [
                Bound(min=0.85).judge(m["label_accuracy"]),
                Bound(min=-0.04).judge(m["label_accuracy_delta"]),
                Bound(max=0.04).judge(m["label_loss_delta"]),
            ]
        )
        assert m["label_accuracy_delta"].sample == 5000
    assert outcomes == [[Outcome.PASSED] * 3, [Outcome.FAILED] * 3]


def test_without_labels_nothing_is_measured():
    """No label of these requests: the counts say so, the metrics are left out, and the judge errs."""
    m = measurements(join(pairs((1, 1)), {"other": 1}), 0.05, 0.05)
    assert set(m) == {"labelled_pairs", "unlabelled_pairs", "unknown_labels", "misfit_labels"}
    assert (m["labelled_pairs"].value, m["unknown_labels"].value) == (0, 1)


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"id": "a", "champion": [1]}'])
def test_lines_that_are_no_pairs_are_refused(line):
    """A line of another kind is an error that tells its number."""
    with pytest.raises(ValueError, match="line 2"):
        read_pairs(['{"id": "a", "champion": [1], "challenger": null}', line])


def test_labels_are_read_from_three_formats(tmp_path):
    """CSV, Parquet and JSON lines give the same; the last label of an id counts, and an empty one has not come yet."""
    rows = [("a", "1"), ("b", "late"), ("c", None), ("a", "0")]
    (tmp_path / "l.csv").write_text("request_id,when,label\n" + "".join(f"{i},now,{v or ''}\n" for i, v in rows))
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps({"request_id": i, "label": v}) for i, v in rows) + "\n\n")
    columns = {"label": [v for _, v in rows], "request_id": [i for i, _ in rows]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    for name in ("l.csv", "l.jsonl", "l.parquet"):
        assert read(tmp_path / name) == {"a": "0", "b": "late"}


def test_numbers_and_lists_keep_their_type(tmp_path):
    """Where the format has types they are kept; ids are text."""
    pq.write_table(pa.table({"request_id": [1, 2], "label": [[0, 1], [1]]}), tmp_path / "l.parquet")
    assert read(tmp_path / "l.parquet") == {"1": [0, 1], "2": [1]}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("l.txt", "", "labels come as .csv, .parquet or .jsonl"),
        ("l.csv", "id,label\n1,2\n", r"no column 'request_id' \(there are: id, label\)"),
        ("l.csv", "request_id,label\n", "holds no label"),
        ("l.csv", "", "no column 'request_id'"),
        ("l.jsonl", "{\n", "line 1 is not JSON"),
        ("l.jsonl", '{"request_id": 1}\n', "line 1: no column 'label'"),
        ("l.jsonl", "[1]\n", "line 1 is no object"),
        ("l.parquet", "no parquet", "cannot be read as labels"),
        ("gone.csv", None, "No such file"),
    ],
)
def test_a_file_that_holds_no_labels_is_told_in_one_line(tmp_path, name, text, told):
    """What is wrong and where, in one line."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(Mistake, match=told) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
