"""The artifact's digest: the same for the same model, another one for any other."""

from pathlib import Path

import pytest

from deployments.artifact import UnsafeArtifact, digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "data").mkdir(parents=True)
    (root / "MLmodel").write_text("flavors: {}")
    (root / "data" / "weights.bin").write_bytes(b"\x00\x01")
    return root


def test_a_copy_has_the_same_digest(model: Path, tmp_path: Path) -> None:
    """The digest depends on names and bytes only, not on place, time or order."""
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    (copy / "data" / "weights.bin").write_bytes(b"\x00\x01")
    (copy / "MLmodel").write_text("flavors: {}")
    assert digest(copy) == digest(model)
    assert digest(model).startswith("sha256:")
    assert len(digest(model)) == 7 + 64


def test_what_a_download_or_an_import_adds_does_not_count(model: Path) -> None:
    """MLflow's registered_model_meta and byte code say nothing about the model."""
    before = digest(model)
    (model / "registered_model_meta").write_text("model_name: m")
    (model / "code" / "__pycache__").mkdir(parents=True)
    (model / "code" / "__pycache__" / "m.pyc").write_bytes(b"x")
    assert digest(model) == before


@pytest.mark.parametrize("change", ["content", "name", "more", "less", "boundary"])
def test_any_change_is_another_digest(model: Path, change: str) -> None:
    """Another content, name or number of files is another model, also where the bytes in a row are the same."""
    before, weights = digest(model), model / "data" / "weights.bin"
    if change == "content":
        weights.write_bytes(b"\x00\x02")
    elif change == "name":
        weights.rename(model / "data" / "weight.bin")
    elif change == "more":
        (model / "extra").touch()
    elif change == "less":
        weights.unlink()
    else:
        weights.write_bytes(b"\x00")
        (model / "data" / "weights.bin2").write_bytes(b"\x01")
    assert digest(model) != before


def test_links_that_lead_out_are_refused(model: Path, tmp_path: Path) -> None:
    """A link out of the directory, to a file or to a directory, is no artifact."""
    (tmp_path / "secret").write_text("x")
    (model / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeArtifact, match="leads out"):
        digest(model)
    (model / "link").unlink()
    (model / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafeArtifact, match="leads out"):
        digest(model)
    (model / "link").unlink()
    (model / "link").symlink_to(model / "data")
    with pytest.raises(UnsafeArtifact, match="link to a directory"):
        digest(model)


def test_a_link_inside_counts_as_its_content(model: Path) -> None:
    """A link within the artifact is a file like any other."""
    (model / "alias").symlink_to("MLmodel")
    linked = digest(model)
    (model / "alias").unlink()
    (model / "alias").write_text("flavors: {}")
    assert digest(model) == linked


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    """There is no digest of nothing."""
    with pytest.raises(FileNotFoundError):
        digest(tmp_path / "nowhere")
