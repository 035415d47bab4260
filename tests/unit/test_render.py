"""The objects of a version as files, and the base that kustomize makes of them."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deployments.kserve import manifests as kserve_manifests
from deployments.kubernetes import names
from deployments.kubernetes.rendering import KUSTOMIZATION, render
from deployments.runtimes import serving
from deployments.target import Traffic, Version
from tests.unit.test_manifests import CLUSTER, MODEL, PYFUNC, version

SERVING = serving(PYFUNC, {}, {})
CANARY = Traffic(MODEL, "2", "3", weight=500)


def test_each_object_is_a_file_of_its_own_at_a_place_that_says_what_it_is():
    """Folders are models and versions; the order is the one in which they are to be applied."""
    assert list(render(CLUSTER, version(), SERVING, CANARY)) == [
        "flight-delay/v3/serviceaccount.yaml",
        "flight-delay/v3/service.yaml",
        "flight-delay/v3/deployment.yaml",
        "flight-delay/v3/poddisruptionbudget.yaml",
        "flight-delay/v3/horizontalpodautoscaler.yaml",
        "flight-delay/httproute.yaml",
    ]


def test_without_traffic_the_route_is_left_alone():
    """Whoever renders a version beside others must not take their requests away."""
    assert not any("httproute" in path for path in render(CLUSTER, version(), SERVING, None))


def test_what_is_rendered_is_what_is_applied():
    """The YAML reads as the very objects, and the same settings give the same text."""
    files = render(CLUSTER, version(), SERVING, CANARY)
    read = [yaml.safe_load(text) for text in files.values()]
    assert {one["metadata"]["annotations"][names.FENCE] for one in read} == {"0"}
    assert read[2]["spec"]["template"]["spec"]["containers"][0]["name"] == "server"
    backends = {ref["name"] for rule in read[-1]["spec"]["rules"] for ref in rule["backendRefs"]}
    assert backends == {"flight-delay-v2", "flight-delay-v3"}
    assert files == render(CLUSTER, version(), SERVING, CANARY)
    assert not any("&id" in text for text in files.values())


def test_a_name_that_had_to_be_changed_is_a_folder_by_its_name_in_the_cluster():
    """Paths are made of names that Kubernetes allows, whatever a model is called in the registry."""
    odd = Version("Flight/Delay v2", "3", Path("/nowhere"), "sha256:ab")
    slug = names.slug(odd.model)
    assert {path.split("/")[0] for path in render(CLUSTER, odd, SERVING, None)} == {slug}
    assert "/" not in slug


def test_the_base_names_every_file_and_leaves_selectors_alone():
    """The kustomization lists what there is, other versions too; its labels do not go into selectors."""
    there = ["flight-delay/v2/deployment.yaml", KUSTOMIZATION]
    files = render(CLUSTER, version(), SERVING, CANARY, kustomize=True, beside=there)
    base = yaml.safe_load(files.pop(KUSTOMIZATION))
    assert base["resources"] == sorted([there[0], *files])
    assert [one["includeSelectors"] for one in base["labels"]] == [False]
    assert "commonLabels" not in base


def test_kserves_objects_are_rendered_alike():
    """Another workload makes other objects, and the same files of them."""
    cluster = CLUSTER.model_copy(
        update={"artifact": CLUSTER.artifact.model_copy(update={"storage_uri": "s3://models/{model}/{version}"})}
    )
    files = render(cluster, version(), SERVING, None, objects=kserve_manifests.version_objects)
    assert "flight-delay/v3/inferenceservice.yaml" in files


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_builds_the_base(tmp_path):
    """Kustomize itself reads it, puts it into another namespace, and changes no selector."""
    files = render(CLUSTER, version(), SERVING, CANARY, kustomize=True)
    for path, text in files.items():
        (tmp_path / "base" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / path).write_text(text)
    overlay = {"resources": ["../base"], "namespace": "staging", "labels": [{"pairs": {"team": "ops"}}]}
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / KUSTOMIZATION).write_text(yaml.safe_dump(overlay))
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "staging")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "deprecated words"
    built = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    assert len(built) == len(files) - 1
    assert {one["metadata"]["namespace"] for one in built.values()} == {"staging"}
    assert {one["metadata"]["labels"]["team"] for one in built.values()} == {"ops"}
    before = yaml.safe_load(files["flight-delay/v3/deployment.yaml"])
    assert built["Deployment"]["spec"] == before["spec"]
    assert built["Service"]["spec"]["selector"] == before["spec"]["selector"]["matchLabels"]
