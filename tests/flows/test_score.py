"""Models are loaded in processes of their own: what they do there is a finding, never our end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import registry
from tasks.score import ScoreError, score, score_in_own_environment
from tests.flows.conftest import Maker, label, rows


@pytest.mark.long
def test_both_ways_of_scoring_agree(settings: Any, maker: Maker, tmp_path: Path) -> None:
    """A forked child and `mlflow models predict` give the same numbers for held-out rows and for the example."""
    path = registry.download(registry.find(maker.model, maker.version()), tmp_path / "model")
    held_out = tmp_path / "held-out.parquet"
    frame = rows(50, 3)
    frame.assign(late=label(frame)).to_parquet(held_out)
    ours = np.asarray(score(path, held_out, "late"))
    theirs = score_in_own_environment(path, held_out, "late", "local", 200)
    assert ours.shape == theirs.shape == (50, 2)
    assert np.allclose(ours, theirs)
    assert np.asarray(score(path)).shape == (2, 2)


def test_what_a_model_raises_is_one_line(settings: Any, maker: Maker, tmp_path: Path) -> None:
    """An exception in the child, or a file that is no model, comes back as a sentence."""
    path = registry.download(registry.find(maker.model, maker.version()), tmp_path / "model")
    frame = rows(5).drop(columns="x")
    frame.to_parquet(tmp_path / "short.parquet")
    with pytest.raises(ScoreError, match="x") as caught:
        score(path, tmp_path / "short.parquet")
    assert "\n" not in str(caught.value)
    (path / "model.skops").write_bytes(b"nothing")
    with pytest.raises(ScoreError, match=r"BadZipFile|not a zip"):
        score(path)
