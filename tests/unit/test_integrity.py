"""What the integrity gate finds without loading anything: unsafe files, requirements not met, false signatures."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickle
import platform
import subprocess
import zipfile
import zlib
from importlib.metadata import version

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from validations import requirements, signing
from validations.integrity import Scan, measurements, scan
from validations.policy import PolicyError, read


def unsafe_files(model):
    return list(scan(model).unsafe)


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
        gzip.compress(BOMBS[4], mtime=0),
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
        gzip.compress(b"a,b\n1,2\n", mtime=0),
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
    """Types that are not classes of scikit-learn, NumPy or SciPy are named."""
    skops.io.dump(FunctionTransformer(os.path.basename), model / "model.skops")
    (finding,) = unsafe_files(model)
    assert finding.path == "model.skops"
    assert "basename" in finding.reason


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
        scanned=scan(model),
        example_error="Traceback ...\n  File x\nValueError: no such column: 'tail'\n",
    )
    assert [m.value for m in bad.values()] == [0, 1, 0, 0]
    assert "aaaa" in bad["digest_matches"].note
    assert bad["unsafe_files"].where == "model.pkl"
    assert bad["answers_example"].note == "ValueError: no such column: 'tail'"
    good = measurements(registered="sha256:a", found="sha256:a", scanned=Scan(), example_error=None)
    assert [m.value for m in good.values()] == [1, 0, 1, 0]


def test_no_digest_matches_nothing():
    """Two missing digests are not a match."""
    assert measurements(registered="", found="", scanned=Scan(), example_error=None)["digest_matches"].value == 0


def test_a_reviewed_file_is_trusted_by_its_bytes(model):
    """A pickle whose SHA-256 the policy names is not counted and is listed; with one byte changed it is counted."""
    (model / "model.pkl").write_bytes(BOMBS[4])
    digest = hashlib.sha256(BOMBS[4]).hexdigest()
    reviewed = scan(model, {"model.pkl": digest})
    assert reviewed.unsafe == ()
    assert [(f.path, f.sha256) for f in reviewed.trusted] == [("model.pkl", digest)]
    assert (
        "model.pkl"
        in measurements(registered="a", found="a", scanned=reviewed, example_error=None)["unsafe_files"].note
    )
    (model / "model.pkl").write_bytes(BOMBS[4] + b" ")
    (finding,) = scan(model, {"model.pkl": digest}).unsafe
    assert "the policy trusts other bytes" in finding.reason
    assert finding.sha256 in finding.reason


def test_a_link_is_never_trusted(model, tmp_path_factory):
    """Trust is in bytes that are part of the model: a link to reviewed bytes elsewhere stays a finding."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.pkl"
    elsewhere.write_bytes(BOMBS[4])
    (model / "model.pkl").symlink_to(elsewhere)
    assert len(scan(model, {"model.pkl": hashlib.sha256(BOMBS[4]).hexdigest()}).unsafe) == 1


POLICY = "version: 1\nmodel: m\ngates:\n  - kind: integrity\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("    trusted: {model.pkl: abc}\n", "SHA-256 of the reviewed file"),
        (f"    trusted: {{../model.pkl: {'a' * 64}}}\n", "no path within the model"),
        (f"    trusted: {{'*.pkl': {'a' * 64}}}\n", "no path within the model"),
        ("    checks: {signature_valid: {min: 1}}\n", "needs `signed_by`"),
        ("    signed_bye: key.pub\n", "did you mean 'signed_by'"),
    ],
)
def test_a_slip_in_the_policy_is_told(lines, said):
    """Trust without a digest, or a signature without a key, is refused in one line."""
    with pytest.raises(PolicyError, match=r"p\.yaml:") as caught:
        read(POLICY + lines, "p.yaml")
    assert said in str(caught.value)


def test_a_signature_is_asked_for_only_with_a_key():
    """`signature_valid` is in force with `signed_by`, and not without."""
    assert "signature_valid" not in read(POLICY).gates[0].bounds()
    assert "signature_valid" in read(POLICY + "    signed_by: key.pub\n").gates[0].bounds(first=True)


MET = [
    "numpy",
    "NumPy>=1",
    f"numpy=={version('numpy')}",
    f"numpy == {version('numpy')} \\\n    --hash=sha256:{'a' * 64}",
    "scikit_learn  # a comment",
    "no-such-package; python_version < '3'",
    "--extra-index-url somewhere",
    "-c constraints.txt",
    "",
    "# nothing",
    "mlflow[extras]>=2",
]
NOT_MET = {
    "no-such-package": "is not installed",
    "no-such-package==1 --hash=sha256:aa": "is not installed",
    "numpy==0.1": f"numpy {version('numpy')} is installed",
    "numpy<2; python_version >= '3'": "is installed",
    "numpy @ git+https://somewhere/numpy.git@v1": "not from",
    "git+https://somewhere/x.git": "name the package",
    "./wheels/numpy-0.1-py3-none-any.whl": f"numpy {version('numpy')} is installed",
    "-e .": "name the package",
    "-r other.txt": "not among its files",
    "-r ../../etc/requirements.txt": "not among its files",
    "numpy=1": "name the package",
}


def test_requirements_that_are_met_are_no_conflict(model):
    """Names in any spelling, versions, markers, hashes, options and comments are read as pip reads them."""
    (model / "requirements.txt").write_text("\n".join(MET))
    assert requirements.conflicts(model) == []


@pytest.mark.parametrize("line", NOT_MET)
def test_a_requirement_that_is_not_met_is_told(model, line):
    """What is missing, of another version or from elsewhere is one conflict that says so and how to mend it."""
    (model / "requirements.txt").write_text(f"numpy\n{line}\n")
    (said,) = requirements.conflicts(model)
    assert NOT_MET[line] in said
    assert "\n" not in said
    measured = measurements(registered="a", found="a", scanned=Scan(), example_error=None, conflicts=[said])
    assert (measured["requirement_conflicts"].value, measured["requirement_conflicts"].note) == (1, said)


def test_included_requirements_are_read(model):
    """`-r` within the model is followed, and a file that includes itself ends."""
    (model / "requirements.txt").write_text("-r more.txt\n")
    (model / "more.txt").write_text("no-such-package\n")
    assert "no-such-package" in requirements.conflicts(model)[0]
    (model / "more.txt").write_text("-r more.txt\n")
    assert len(requirements.conflicts(model)) == 1


def test_a_model_that_does_not_say_what_it_needs_is_a_conflict(model):
    """Without requirements.txt nothing can be compared, which is a conflict and never "none"."""
    (model / "requirements.txt").unlink()
    assert "pip_requirements" in requirements.conflicts(model)[0]


def test_another_python_counts_where_bytecode_is_trusted(model):
    """Another minor version of Python is a conflict for a model with a trusted pickle; a patch version never is."""
    major, minor, _ = platform.python_version_tuple()
    (model / "python_env.yaml").write_text(f"python: {major}.{minor}.99\n")
    assert requirements.conflicts(model, python=True) == []
    (model / "python_env.yaml").write_text(f"python: {major}.{int(minor) + 1}.0\n")
    assert requirements.conflicts(model) == []
    assert f"{major}.{int(minor) + 1}.0" in requirements.conflicts(model, python=True)[0]


@pytest.fixture
def signed(model, tmp_path_factory):
    """A model with a real signature, and the folder of the keys: key, key.pub and other.pub."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing.signing import Config

    keys = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        (keys / name).write_bytes(private)
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (keys / f"{name}.pub").write_bytes(public)
    Config().use_elliptic_key_signer(private_key=keys / "key").sign(model, model / signing.SIGNATURE)
    return keys


def test_a_real_signature_is_valid(model, signed):
    """What `model-signing` signed is valid for its key, also after MLflow's download added its own file."""
    (model / "registered_model_meta").write_text("model_name: m\n")
    assert signing.error(model, signed / "key.pub") == ""
    measured = measurements(registered="a", found="a", scanned=scan(model), example_error=None, signature_error="")
    assert (measured["signature_valid"].value, measured["unsafe_files"].value) == (1, 0)


@pytest.mark.parametrize("tampering", ["changed", "added", "removed", "another key", "no signature", "cut off"])
def test_a_tampered_model_has_no_valid_signature(model, signed, tampering):
    """A changed, added or removed file, another's key or a broken signature: one line says what is wrong."""
    key = signed / ("other.pub" if tampering == "another key" else "key.pub")
    signature = model / signing.SIGNATURE
    {
        "changed": lambda: (model / "MLmodel").write_text("flavors: {x: y}\n"),
        "added": lambda: (model / "more.txt").write_text("x"),
        "removed": (model / "input_example.json").unlink,
        "another key": dict,
        "no signature": signature.unlink,
        "cut off": lambda: signature.write_bytes(signature.read_bytes()[:100]),
    }[tampering]()
    said = signing.error(model, key)
    assert said
    assert "\n" not in said
    measured = measurements(registered="a", found="a", scanned=Scan(), example_error=None, signature_error=said)
    assert measured["signature_valid"].value == 0


def test_a_key_that_is_none_is_told(model, signed):
    """A file that is no public key is the policy's mistake, not the model's."""
    (signed / "bad.pub").write_text("not a key")
    with pytest.raises(signing.UnusableKey, match=r"bad.pub is no public key"):
        signing.error(model, signed / "bad.pub")
