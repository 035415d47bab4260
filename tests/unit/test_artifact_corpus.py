"""The corpus of malicious, broken and harmless artifacts: each bad one is refused by name, none is executed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.corpus.artifacts import BAD, HARMLESS, MLMODEL
from validations.integrity import scan


@pytest.fixture
def model(tmp_path):
    """A harmless model folder; `tmp_path / "executed"` is what a payload would make."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "MLmodel").write_text(MLMODEL)
    (folder / "requirements.txt").write_text("mlflow\n")
    return folder


def test_the_corpus_is_large():
    """At least 45 bad and 20 harmless artifacts are held against the gate."""
    assert len(BAD) >= 45
    assert len(HARMLESS) >= 20


@pytest.mark.parametrize("name", BAD)
def test_a_bad_artifact_is_refused_by_name(name, model, tmp_path):
    """A malicious or broken file is the one finding, with its path, one line of reason, and no payload run."""
    marker = tmp_path / "executed"
    path = BAD[name].make(model, marker)
    findings = scan(model).unsafe
    assert [finding.path for finding in findings] == [path]
    assert BAD[name].says.lower() in findings[0].reason.lower(), findings[0].reason
    assert findings[0].reason.isprintable()
    assert not marker.exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_artifact_is_not_refused(name, model, tmp_path):
    """What honest models hold is no finding."""
    HARMLESS[name].make(model, tmp_path / "executed")
    assert scan(model).unsafe == ()


@pytest.mark.parametrize("name", ["pickle calling exec", "text pickle cut off after the call", "INST", "joblib"])
def test_the_payloads_are_live(name, model, tmp_path):
    """The corpus is not of straw: what an unpickler makes of these files is the marker."""
    marker = tmp_path / "executed"
    path = BAD[name].make(model, marker)
    code = "import sys, joblib, pickle\nfile = open(sys.argv[1], 'rb')\n(joblib if 'jobl' in sys.argv[2] else pickle).load(file)"
    subprocess.run([sys.executable, "-c", code, str(model / path), name], capture_output=True, check=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["zip bomb", "gzip bomb", "bzip2 bomb", "folders three hundred deep"])
def test_a_bomb_takes_no_memory(name, model, tmp_path):
    """A file that unpacks to far more than it is costs the gate less than 100 MiB of memory."""
    BAD[name].make(model, tmp_path / "executed")
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom validations.integrity import scan\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert scan(Path(sys.argv[1])).unsafe\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd=root, env=os.environ, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100


MAGICS = [
    b"",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
    b"BZh91AY&SY",
    b"\xfd7zXZ\x00",
    b"\x78\x9c",
    b"\x93NUMPY\x01\x00",
    b"\x80\x04",
    b"cos\n",
]
NAMES = ["a.npy", "a.json", "a.yaml", "MLmodel", "a.safetensors", "a.skops", "a.onnx", "a.h5", "a.bin", "a.tar"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), magic=st.sampled_from(MAGICS), rest=st.binary(max_size=600))
def test_no_bytes_make_the_look_fail(name, magic, rest, model):
    """Whatever a file holds, the look ends with a finding or without one, and never with an error."""
    path = model / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(magic + rest)
    try:
        scan(model)
    finally:
        path.unlink() if before is None else path.write_bytes(before)
