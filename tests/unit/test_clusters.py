"""The file of clusters: what it may say, and the one line that a mistake in it costs."""

from pathlib import Path

import pytest

from tasks.clusters import cluster, read_clusters
from tasks.settings import Mistake, Settings
from tasks.targets import choose, settings_target

GOOD = """
clusters:
  - name: eu
    context: kind-eu
    namespace: models
    gateway: {name: public, url: "http://127.0.0.1:8080"}
  - name: us
    gateway: {name: public, url: "http://127.0.0.1:8081", host: "{model}.example.org"}
"""


def test_the_first_cluster_is_meant_unless_one_is_named(tmp_path: Path) -> None:
    """The home's file is used where no other is named; TITLESHOT_CLUSTER chooses, and a wrong name is one line."""
    (tmp_path / "clusters.yaml").write_text(GOOD)
    settings = Settings(home=tmp_path)
    first = cluster(settings)
    assert first is not None
    assert (first.name, first.context, first.namespace) == ("eu", "kind-eu", "models")
    second = cluster(settings.model_copy(update={"cluster": "us"}))
    assert second is not None
    assert second.gateway.host == "{model}.example.org"
    with pytest.raises(Mistake, match=r"no cluster 'uss' in .*did you mean 'us'"):
        cluster(settings.model_copy(update={"cluster": "uss"}))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "a file of clusters is a mapping"),
        ("clusters: []", "clusters: "),
        (
            GOOD.replace("namespace", "namespcae"),
            r"clusters.yaml:5: .*unknown word 'namespcae'; did you mean 'namespace'",
        ),
        (GOOD.replace("name: public, url", "nme: public, url", 1), r"clusters.yaml:6: .*unknown word 'nme'"),
        (GOOD.replace("name: us", "name: eu"), "two clusters are called 'eu'"),
        (GOOD.replace(', url: "http://127.0.0.1:8080"', ""), r"clusters.yaml:6: .*`url` is missing"),
        ("clusters: [", "not YAML"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(text: str, line: str, tmp_path: Path) -> None:
    """File, line, and what would be right."""
    path = tmp_path / "clusters.yaml"
    path.write_text(text)
    with pytest.raises(Mistake, match=line) as caught:
        read_clusters(path)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2


def test_a_policy_for_a_cluster_needs_one(tmp_path: Path) -> None:
    """Without a file of clusters, `target: kubernetes` is refused with how to mend it."""
    target = settings_target(Settings(home=tmp_path))
    choose(target, "flight-delay", "local")
    with pytest.raises(Mistake, match=r"TITLESHOT_CLUSTERS"):
        choose(target, "flight-delay", "kubernetes")
