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


def test_the_route_keeps_the_own_paths_of_all_that_is_deployed():
    """A version that is kept warm, or on its way, has its path also where it is in no traffic."""
    files = render(CLUSTER, version(), SERVING, Traffic(MODEL, "2"), deployed=["10", "2"])
    rules = yaml.safe_load(files["flight-delay/httproute.yaml"])["spec"]["rules"]
    assert [rule["matches"][0]["path"]["value"] for rule in rules] == ["/v/2", "/v/3", "/v/10", "/"]


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


def test_the_base_names_every_file_and_changes_none():
    """The kustomization lists what there is, other versions too; overlays that lie in the same folder, and hidden files,
    are no part of it."""
    there = ["flight-delay/v2/deployment.yaml", KUSTOMIZATION, ".github/workflows/ci.yaml"]
    over = [f"overlays/staging/{KUSTOMIZATION}", "overlays/staging/more/patch.yaml"]
    files = render(CLUSTER, version(), SERVING, CANARY, kustomize=True, beside=[*there, *over])
    base = yaml.safe_load(files.pop(KUSTOMIZATION))
    assert base.pop("resources") == sorted([there[0], *files])
    assert base.keys() == {"apiVersion", "kind"}


def test_kserves_objects_are_rendered_alike():
    """Another workload makes other objects, and the same files of them."""
    cluster = CLUSTER.model_copy(
        update={"artifact": CLUSTER.artifact.model_copy(update={"storage_uri": "s3://models/{model}/{version}"})}
    )
    files = render(cluster, version(), SERVING, None, objects=kserve_manifests.version_objects)
    assert "flight-delay/v3/inferenceservice.yaml" in files


def kustomized(folder: Path, files: dict[str, str], **overlay: object) -> dict[str, dict]:
    """What kubectl's kustomize makes of an overlay on the base of these files, by kind."""
    folder.mkdir()
    for path, text in files.items():
        (folder / "base" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "base" / path).write_text(text)
    (folder / "over").mkdir()
    (folder / "over" / KUSTOMIZATION).write_text(yaml.safe_dump({"resources": ["../base"], **overlay}))
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder / "over")], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "deprecated words"
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_builds_the_base_and_what_a_team_may_lay_over_it(tmp_path: Path) -> None:
    """Labels (in pods too), annotations, images and patches of a container change what they name: no name, no selector,
    nobody's way to anybody, and no annotation of ours."""
    files = render(CLUSTER, version(), SERVING, CANARY, kustomize=True)
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "server", "env": [{"name": "A", "value": "b"}]}]}}}}
    patch |= {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "any"}}
    built = kustomized(
        tmp_path / "may",
        files,
        labels=[{"pairs": {"team": "ops"}, "includeTemplates": True}],
        commonAnnotations={"owner": "ml"},
        images=[{"name": "titleshot", "newName": "mirror.example.test/titleshot", "newTag": "9"}],
        patches=[{"target": {"kind": "Deployment", "name": "flight-delay-v3"}, "patch": yaml.safe_dump(patch)}],
    )
    before = {one["kind"]: one for one in map(yaml.safe_load, files.values())}
    del before["Kustomization"]
    assert built.keys() == before.keys()
    for kind, one in built.items():
        meta, was = one["metadata"], before[kind]["metadata"]
        assert (meta["name"], meta["namespace"]) == (was["name"], was["namespace"])
        assert meta["labels"] == {**was["labels"], "team": "ops"}
        assert meta["annotations"] == {**was["annotations"], "owner": "ml"}
        if kind != "Deployment":
            assert one.get("spec") == before[kind].get("spec")
    spec, was = built["Deployment"]["spec"], before["Deployment"]["spec"]
    assert spec["selector"] == was["selector"] == {"matchLabels": before["Service"]["spec"]["selector"]}
    assert spec["template"]["metadata"]["labels"] == {**was["template"]["metadata"]["labels"], "team": "ops"}
    (server,), (first,) = (one["template"]["spec"]["containers"] for one in (spec, was))
    assert server["image"] == "mirror.example.test/titleshot:9"
    assert server["command"] == first["command"]
    assert {"name": "A", "value": "b"} in server["env"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_breaks_what_docs_gitops_says_it_breaks(tmp_path: Path) -> None:
    """Another prefix does not reach the route's backends; another namespace reaches neither fallbacks nor the route's
    parent: those are settings."""
    files = render(CLUSTER, version(), SERVING, CANARY, kustomize=True)
    built = kustomized(tmp_path / "not", files, namePrefix="a-", namespace="staging")
    spec = built["HTTPRoute"]["spec"]
    assert built["Service"]["metadata"]["name"] == "a-flight-delay-v3"
    assert {ref["name"] for rule in spec["rules"] for ref in rule["backendRefs"]} == {
        "flight-delay-v2",
        "flight-delay-v3",
    }
    assert spec["parentRefs"] == yaml.safe_load(files["flight-delay/httproute.yaml"])["spec"]["parentRefs"]
    assert built["Deployment"]["metadata"]["namespace"] == "staging"
    command = built["Deployment"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "http://flight-delay-v{version}.models.svc:8080" in command
