"""Files that run code when they are loaded are found by name and by content, without loading them."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import subprocess
import zipfile
import zlib

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from validations.integrity import measurements, unsafe_files


class Bomb:
    """A pickle that says so when somebody loads it."""

    def __reduce__(self):
        return (os.putenv, ("TITLESHOT_EXPLODED", "yes"))


@pytest.fixture
def model(tmp_path):
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    (tmp_path / "requirements.txt").write_text("mlflow\n")
    (tmp_path / "input_example.json").write_text("{}")
    skops.io.dump(LogisticRegression().fit([[0.0], [1.0]], [0, 1]), tmp_path / "model.skops")
    (tmp_path / "weights.npy").write_bytes(_npy(np.arange(3.0)))
    yield tmp_path
    # A bomb that went off would be seen by children.
    seen = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert "TITLESHOT_EXPLODED" not in seen


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _zip(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return file.getvalue()


def _joblib(compress):
    file = io.BytesIO()
    joblib.dump([Bomb(), np.arange(50)], file, compress=compress)
    return file.getvalue()


BOMBS = {protocol: pickle.dumps(Bomb(), protocol=protocol) for protocol in range(6)}


def test_an_ordinary_skops_model_is_safe(model):
    """A scikit-learn model stored by skops, with its plain files, has no finding."""
    assert unsafe_files(model) == []


@pytest.mark.parametrize(
    "name", ["model.pkl", "a/python_model.PKL", "m.joblib", "m.dill", "x.pickle", "net.pt", "n.pth"]
)
def test_pickles_are_found_by_name(model, name):
    """Names that pickles go by are findings whatever is inside."""
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"anything")
    (finding,) = unsafe_files(model)
    assert finding.path == name
    assert "pickle" in finding.reason


@pytest.mark.parametrize(
    "content",
    [
        *BOMBS.values(),
        pickle.dumps([Bomb(), list(range(50_000))], protocol=0),
        *(
            pickle.dumps(value, protocol=p)
            for p in range(2, 6)
            for value in ({"a": 1}, [1], "text", 5, None, np.ones(3))
        ),
        _joblib(0),
        *(_joblib((kind, 3)) for kind in ("zlib", "gzip", "bz2", "xz")),
        gzip.compress(BOMBS[4]),
        zlib.compress(BOMBS[2]),
        bz2.compress(BOMBS[5]),
        lzma.compress(BOMBS[5]),
        _npy(np.array([Bomb()], dtype=object)),
        _npy(np.array([(1, "x")], dtype=[("n", "i4"), ("o", "O")])),
        _zip(archive__data_dot_pkl=b"x"),
        _zip(archive__data=BOMBS[2]),
        _zip(arr_0_dot_npy=_npy(np.array([None], dtype=object))),
    ],
    ids=lambda content: content[:8].hex(),
)
def test_pickles_are_found_by_content(model, content):
    """Pickles of every protocol, compressed, zipped, or as NumPy objects, are found under an innocent name."""
    (model / "innocent.bin").write_bytes(content)
    assert [finding.path for finding in unsafe_files(model)] == ["innocent.bin"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"plain text\n",
        b"columns\nand rows\n",
        b"cloudpickle\nnumpy\npandas==3.1\n",
        b"cloudpickle\nscikit-learn\n",
        b"cloudpickle==3\nmlflow\nnumpy\n",
        b"(see the notes)\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        _npy(np.arange(10)),
        _npy(np.array([(1, 2.0)], dtype=[("Only", "i4"), ("Other", "f8")])),
        _zip(readme_dot_txt=b"hello", arr_0_dot_npy=_npy(np.zeros(3))),
        gzip.compress(b"a,b\n1,2\n"),
        b"PAR1" + bytes(50),
    ],
    ids=lambda content: content[:8].hex(),
)
def test_plain_data_is_no_finding(model, content):
    """Text, images, tables, plain arrays and archives of them are safe."""
    (model / "data.bin").write_bytes(content)
    assert unsafe_files(model) == []


def test_a_broken_archive_is_a_finding(model):
    """What looks like an archive and cannot be looked into is not vouched for."""
    (model / "data.bin").write_bytes(_zip(a=b"x" * 100)[:60])
    assert "cannot be looked into" in unsafe_files(model)[0].reason


def test_a_skops_file_is_no_safer_than_its_types(model):
    """Types that are neither scikit-learn's, NumPy's nor SciPy's are named, unless somebody vouched for them."""
    skops.io.dump(FunctionTransformer(os.path.basename), model / "model.skops")
    (finding,) = unsafe_files(model)
    assert finding.path == "model.skops"
    assert "basename" in finding.reason
    (named,) = skops.io.get_untrusted_types(file=model / "model.skops")
    assert unsafe_files(model, trusted={named}) == []


def test_a_skops_file_that_is_none_is_a_finding(model):
    """A file that only claims to be skops is not vouched for."""
    (model / "model.skops").write_bytes(b"no zip")
    assert "skops" in unsafe_files(model)[0].reason


def test_a_path_may_not_lead_out_of_the_model(model, tmp_path_factory):
    """A link to a file or folder elsewhere is a finding; one within the model is not followed twice."""
    outside = tmp_path_factory.mktemp("elsewhere")
    (outside / "secret.txt").write_text("x")
    (model / "file").symlink_to(outside / "secret.txt")
    (model / "folder").symlink_to(outside)
    (model / "dangling").symlink_to(outside / "nothing")
    (model / "inside").symlink_to(model / "MLmodel")
    findings = unsafe_files(model)
    assert {f.path for f in findings} == {"file", "folder", "dangling"}
    assert {f.reason for f in findings} == {"leads out of the model's directory"}


def test_a_pipe_does_not_hold_up_the_look(model):
    """A named pipe is a finding, and is not opened: reading it would wait for ever."""
    os.mkfifo(model / "pipe")
    assert [(f.path, f.reason) for f in unsafe_files(model)] == [("pipe", "is no regular file")]


def test_without_a_model_there_is_nothing_to_vouch_for(tmp_path):
    """A directory that is not there is an error, never "no findings"."""
    with pytest.raises(ValueError, match="no model at"):
        unsafe_files(tmp_path / "nowhere")


def test_the_measurements_say_what_and_where(model):
    """Digest, unsafe files and the example are exact facts with the first culprit and its reason."""
    (model / "model.pkl").write_bytes(BOMBS[4])
    bad = measurements(
        registered="sha256:" + "a" * 64,
        found="sha256:" + "b" * 64,
        unsafe=unsafe_files(model),
        example_error="Traceback ...\n  File x\nValueError: no such column: 'tail'\n",
    )
    assert [m.value for m in bad.values()] == [0, 1, 0]
    assert "aaaa" in bad["digest_matches"].note
    assert bad["unsafe_files"].where == "model.pkl"
    assert bad["answers_example"].note == "ValueError: no such column: 'tail'"
    good = measurements(registered="sha256:a", found="sha256:a", unsafe=[], example_error=None)
    assert [m.value for m in good.values()] == [1, 0, 1]


def test_no_digest_matches_nothing():
    """Two missing digests are not a match."""
    assert measurements(registered="", found="", unsafe=[], example_error=None)["digest_matches"].value == 0
