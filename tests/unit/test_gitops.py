"""Changes by commits: a bare repository, an Argo CD of the tests' own, and the tests' API server."""

import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from deployments.kubernetes import gitops, names
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Cluster, Gateway, GitOps
from deployments.kubernetes.gitops import Branch, Committed, difference
from deployments.target import StaleFence, TargetError, TargetUnavailable, Traffic
from tests.cluster.apiserver import ApiServer
from tests.cluster.rest import Api, ApiError
from tests.unit.test_kserve import MODEL, KServe, at, downloaded


def git(where: Path, *arguments: str, given: str = "") -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=ana", "-c", "user.email=ana@example.org", "-C", str(where), *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A bare repository with one file that is not ours."""
    bare = tmp_path_factory.mktemp("template") / "fleet.git"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(bare)], check=True)
    stream = "commit refs/heads/main\ncommitter ana <ana@example.org> 0 +0000\ndata 5\nfirst\nM 644 inline README.md\n"
    git(bare, "fast-import", "--quiet", given=f"{stream}data 16\nours and theirs\n\n")
    return bare


@pytest.fixture
def repository(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "fleet.git")


def foreign(bare: Path, name: str, text: str) -> None:
    """Somebody else's commit."""
    work = bare.parent / "work"
    if work.exists():
        git(work, "pull", "--quiet", "--rebase", "origin", "main")
    else:
        git(bare, "clone", "--quiet", str(bare), str(work))
    (work / name).write_text(text)
    git(work, "add", name)
    git(work, "commit", "--quiet", "-m", f"somebody else writes {name}")
    git(work, "push", "--quiet", "origin", "HEAD:main")


def files(bare: Path) -> dict[str, str]:
    """What the branch holds, by path."""
    paths = git(bare, "ls-tree", "-r", "--name-only", "main").split()
    rest, held = git(bare, "cat-file", "--batch", given="".join(f"main:{path}\n" for path in paths)), {}
    for path in paths:
        head, rest = rest.split("\n", 1)
        size = int(head.split()[2])  # the files of these tests are ASCII
        held[path], rest = rest[:size], rest[size + 1 :]
    return held


def settings(bare: Path, **more) -> GitOps:
    return GitOps(repository=str(bare), path="clusters/one", **{"timeout": 20, **more})


def config(name: str, fence: int, colour: str) -> dict:
    """An object of a version. (Of a kind that nothing but us reacts to.)"""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": names.labels("flight-delay", "3"),
            "annotations": {names.FENCE: str(fence), names.PROMOTION: "p-1"},
        },
        "data": {"colour": colour},
    }


# --- the branch


def test_a_commit_says_who_and_why_and_leaves_the_rest_alone(repository):
    """What is committed is what was asked for, by "titleshot", on top of what others have there."""
    before = git(repository, "rev-parse", "main").strip()
    commit = Branch(settings(repository)).commit(lambda _: {"a/b.yaml": b"x: 1\n"}, "deploy 3\n\nTitleshot-Lease: 7\n")
    assert files(repository) == {"README.md": "ours and theirs\n", "a/b.yaml": "x: 1\n"}
    said = git(repository, "log", "-1", "--format=%H %P %an %s %(trailers:key=Titleshot-Lease,valueonly)", "main")
    assert said.split() == [commit, before, "titleshot", "deploy", "3", "7"]


def test_the_same_again_is_no_commit(repository):
    """Where nothing changes there is nothing to push, and the newest commit is the one that has it."""
    branch = Branch(settings(repository))
    first = branch.commit(lambda _: {"a.yaml": b"x: 1\n"}, "once")
    assert branch.commit(lambda _: {"a.yaml": b"x: 1\n"}, "twice") == first
    assert branch.commit(lambda _: {}, "nothing") == first
    assert git(repository, "rev-list", "--count", "main").strip() == "2"


def test_a_commit_of_somebody_else_in_between_is_kept_and_looked_at(repository):
    """A push that is not a fast-forward is made anew on top of the newest commit, and `change` sees that one."""
    seen = []

    def change(head):
        seen.append(head.read("theirs.txt"))
        if len(seen) == 1:
            foreign(repository, "theirs.txt", "mine\n")
        return {"ours.yaml": b"x: 1\n"}

    Branch(settings(repository)).commit(change, "ours")
    assert seen == [None, b"mine\n"]
    assert set(files(repository)) == {"README.md", "theirs.txt", "ours.yaml"}
    assert git(repository, "rev-list", "--count", "--merges", "main").strip() == "0"


@pytest.mark.long
def test_where_others_are_always_faster_it_is_said(repository, monkeypatch):
    """The attempts are bounded; the repository has none of it then."""
    monkeypatch.setattr(gitops, "ATTEMPTS", 2)
    count = iter(range(9))

    def change(_):
        foreign(repository, "theirs.txt", f"{next(count)}\n")
        return {"ours.yaml": b"x: 1\n"}

    with pytest.raises(TargetUnavailable, match="2 times somebody else's commit"):
        Branch(settings(repository)).commit(change, "ours")
    assert "ours.yaml" not in files(repository)


def test_a_refused_push_leaves_nothing_and_is_final(repository):
    """What a hook of the repository says is handed on; the next attempt begins from the branch again."""
    hook = repository / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'main is protected: open a pull request' >&2\nexit 1\n")
    hook.chmod(0o755)
    branch = Branch(settings(repository))
    with pytest.raises(TargetError, match=r"refused the push to main.*protected: open a pull request") as refused:
        branch.commit(lambda _: {"a.yaml": b"x: 1\n"}, "no")
    assert not isinstance(refused.value, TargetUnavailable)
    hook.unlink()
    branch.commit(lambda _: {"b.yaml": b"x: 1\n"}, "yes")
    assert set(files(repository)) == {"README.md", "b.yaml"}


def test_a_repository_that_is_not_there_is_refused_without_its_password(tmp_path):
    """Addresses in messages say no credentials, and a repository that may come back is worth another try."""
    absent = GitOps(repository="http://ana:secret@127.0.0.1:9/fleet.git")
    with pytest.raises(TargetUnavailable, match=r"http://127\.0\.0\.1:9/fleet\.git") as refused:
        Branch(absent).commit(lambda _: {"a.yaml": b""}, "no")
    assert "secret" not in str(refused.value)
    with pytest.raises(TargetError, match="does not appear to be a git repository") as refused:
        Branch(GitOps(repository=str(tmp_path / "nothing"))).commit(lambda _: {"a.yaml": b""}, "no")
    assert not isinstance(refused.value, TargetUnavailable)


def test_an_unknown_branch_is_a_mistake_and_an_empty_repository_a_beginning(repository, tmp_path):
    """Nobody's branch is made by a typo; in a repository without commits ours is the first."""
    with pytest.raises(TargetError, match="has no branch mian"):
        Branch(settings(repository, branch="mian")).commit(lambda _: {"a.yaml": b""}, "no")
    empty = tmp_path / "empty.git"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(empty)], check=True)
    Branch(settings(empty)).commit(lambda _: {"a.yaml": b"x: 1\n"}, "first")
    assert files(empty) == {"a.yaml": "x: 1\n"}


@pytest.mark.long
def test_a_hook_of_another_repository_does_not_lead_us_astray(repository, tmp_path, monkeypatch):
    """GIT_DIR and the like, set where we are begun from, are not ours."""
    other = shutil.copytree(repository, tmp_path / "other.git")
    before = git(other, "count-objects")
    monkeypatch.setenv("GIT_DIR", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    Branch(settings(repository)).commit(lambda _: {"a.yaml": b"x: 1\n"}, "ours")
    monkeypatch.undo()
    assert "a.yaml" in files(repository)
    assert git(other, "count-objects") == before


@pytest.mark.parametrize("path", ["/etc", "../other", ".git/hooks"])
def test_the_folder_lies_inside_the_repository(repository, path):
    """A path that leads out of it is refused."""
    cluster = Cluster(
        gateway=Gateway(name="g", url="http://127.0.0.1"), gitops=GitOps(repository=str(repository), path=path)
    )
    with pytest.raises(TargetError, match="must be a folder inside"):
        Committed(Client(cluster), cluster)


# --- what is the same


def test_a_difference_is_named_by_its_path():
    """More than was wanted is no difference, nor is another way to write a quantity, nor something empty left out."""
    wanted = {"spec": {"rules": [{"weight": 90}], "limits": {"cpu": "1000m", "memory": "1Gi"}, "none": []}}
    found = {
        "spec": {"rules": [{"weight": 90, "kind": "Service"}], "limits": {"cpu": 1, "memory": "1024Mi"}},
        "status": {},
    }
    assert difference(wanted, found) is None
    found["spec"]["rules"][0]["weight"] = 95
    assert difference(wanted, found) == "spec.rules[0].weight (90, there: 95)"
    assert difference({"a": [1, 2]}, {"a": [1]}) == "a ([1, 2], there: [1])"
    assert difference({"a": {"b": "x"}}, {"a": {}}) == 'a.b ("x", there: nothing)'
    assert difference({"a": True}, {"a": 1.5}) == "a (true, there: 1.5)"


# --- the cluster obeys


class Argo:
    """An Argo CD: applies what the branch holds, as a field manager of its own, and prunes what it holds no more."""

    def __init__(self, bare: Path, api: Api, prune: bool = True) -> None:
        self.bare, self.api, self.prune, self.applied = bare, api, prune, {}

    def sync(self) -> None:
        wanted = {}
        for path, text in files(self.bare).items():
            if path.startswith("clusters/one/"):
                one = yaml.safe_load(text)
                wanted[one["kind"], one["metadata"]["namespace"], one["metadata"]["name"]] = one
        for (kind, space, name), one in wanted.items():
            query = {"fieldManager": "argocd-controller", "force": "true", "fieldValidation": "Strict"}
            self.api.request(
                "PATCH", self.api.path(kind, space, name), one, query=query, kind="application/apply-patch+yaml"
            )
        for kind, space, name in self.applied.keys() - wanted.keys():
            if self.prune:
                self.api.delete(kind, space, name)
        self.applied = wanted

    @contextmanager
    def running(self, after: float = 0.0):
        """Syncs over and over in a thread, beginning some seconds after each commit."""
        stop, seen = threading.Event(), [""]

        def run():
            while not stop.wait(0.02):
                head = git(self.bare, "rev-parse", "main").strip()
                if head != seen[0]:
                    if stop.wait(after):
                        return
                    try:
                        self.sync()
                    except (subprocess.CalledProcessError, ApiError):
                        continue  # the branch went on while it was read
                    seen[0] = head

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def server(tmp_path):
    with ApiServer() as server:
        server.kubeconfig(tmp_path / "kubeconfig")
        yield server


@pytest.fixture
def api(server, tmp_path) -> Api:
    return Api(tmp_path / "kubeconfig")


def hand(bare: Path, tmp_path: Path, **more) -> Committed:
    cluster = Cluster(
        kubeconfig=tmp_path / "kubeconfig",
        gateway=Gateway(name="g", url="http://127.0.0.1"),
        gitops=settings(bare, **more),
        patience=2,
    )
    return Committed(Client(cluster), cluster, every=0.02)


def test_objects_are_committed_and_awaited(repository, api, tmp_path):
    """What `apply` returns is what the cluster has; nothing of it was written there by us."""
    with Argo(repository, api).running(after=0.3):
        made = hand(repository, tmp_path).apply([config("one", 7, "red"), config("two", 7, "blue")], why="deploy 3")
    assert [one["data"]["colour"] for one in made] == ["red", "blue"]
    managers = {one["manager"] for one in made[0]["metadata"]["managedFields"]}
    assert managers == {"argocd-controller"}
    assert set(files(repository)) - {"README.md"} == {
        "clusters/one/flight-delay/v3/configmap-one.yaml",
        "clusters/one/flight-delay/v3/configmap-two.yaml",
    }
    said = git(repository, "log", "-1", "--format=%B", "main")
    assert said.strip() == "deploy 3\n\nTitleshot-Promotion: p-1\nTitleshot-Lease: 7"


@pytest.mark.long
def test_the_same_again_waits_and_commits_nothing(repository, api, tmp_path):
    """A step that is repeated after a crash finds its commit, and waits for it to be obeyed."""
    argo, ours = Argo(repository, api), hand(repository, tmp_path)
    with argo.running():
        ours.apply([config("one", 7, "red")], why="deploy 3")
    count = git(repository, "rev-list", "--count", "main")
    api.delete("ConfigMap", "default", "one")
    threading.Timer(0.2, argo.sync).start()
    assert hand(repository, tmp_path).apply([config("one", 7, "red")], why="deploy 3")[0]["data"] == {"colour": "red"}
    assert git(repository, "rev-list", "--count", "main") == count


def test_a_dead_argo_is_told_of_with_the_commit_and_the_object(repository, api, tmp_path):
    """Not obeying is worth another try, and says what waits: the commit stays, for whoever wakes up."""
    with pytest.raises(TargetUnavailable) as late:
        hand(repository, tmp_path, timeout=0.3).apply([config("one", 7, "red")], why="deploy 3")
    commit = git(repository, "rev-parse", "--short=10", "main").strip()
    assert f"commit {commit} (deploy 3) is in main of {repository}" in str(late.value)
    assert "0.3 s later the cluster has not obeyed: ConfigMap/one is not there" in str(late.value)
    assert "apply clusters/one?" in str(late.value)


def test_what_differs_is_named(repository, api, tmp_path):
    """An object with another content than the one committed is not taken for it."""
    api.apply(config("one", 7, "green"))
    with pytest.raises(TargetUnavailable, match=r'ConfigMap/one differs in data\.colour \("red", there: "green"\)'):
        hand(repository, tmp_path, timeout=0.1).apply([config("one", 7, "red")], why="deploy 3")


def test_a_stale_holder_commits_nothing(repository, api, tmp_path):
    """The fence in the branch's newest commit decides, also where the cluster has not seen that commit yet."""
    with Argo(repository, api).running():
        hand(repository, tmp_path).apply([config("one", 7, "red")], why="ours")
    before = git(repository, "rev-parse", "main")
    with pytest.raises(StaleFence, match="committed under lease 7, ours is 6"):
        hand(repository, tmp_path).apply([config("one", 6, "blue")], why="from the dead")
    old = config("one", 6, "blue")
    with pytest.raises(StaleFence):
        hand(repository, tmp_path).delete([old], why="from the dead")
    assert git(repository, "rev-parse", "main") == before


def test_a_holder_overtaken_while_it_waits_stops_waiting(repository, api, tmp_path):
    """Where a later lease has changed the object in the cluster, ours will never come."""
    threading.Timer(0.2, lambda: api.apply(config("one", 8, "blue"))).start()
    with pytest.raises(StaleFence, match="changed under lease 8, ours is 7"):
        hand(repository, tmp_path).apply([config("one", 7, "red")], why="slow")


def test_deleting_takes_a_versions_folder_away_and_waits_for_the_cluster(repository, api, tmp_path):
    """Once it returns the objects are gone, in one commit; the next of them finds it so, and others stay."""
    other = config("other", 7, "blue")
    other["metadata"]["labels"] = names.labels("flight-delay", "30")
    with Argo(repository, api).running(after=0.1):
        ours = hand(repository, tmp_path)
        [one, two, _] = ours.apply([config("one", 7, "red"), config("two", 7, "blue"), other], why="deploy 3")
        ours.delete([one], why="retire 3")
        assert api.get("ConfigMap", "one", "default") is None
        count = git(repository, "rev-list", "--count", "main")
        ours.delete([two], why="retire 3")
        assert api.get("ConfigMap", "two", "default") is None
        assert git(repository, "rev-list", "--count", "main") == count
    assert api.get("ConfigMap", "other", "default") is not None
    assert [path for path in files(repository) if path.startswith("clusters/")] == [
        "clusters/one/flight-delay/v30/configmap-other.yaml"
    ]


@pytest.mark.long
def test_a_route_is_deleted_alone(repository, api, tmp_path):
    """It has no version, so nothing goes with it."""
    route = {**config("flight-delay", 7, "red"), "metadata": {**config("flight-delay", 7, "red")["metadata"]}}
    route["metadata"]["labels"] = names.labels("flight-delay")
    with Argo(repository, api).running():
        ours = hand(repository, tmp_path)
        ours.apply([config("one", 7, "red"), route], why="deploy 3")
        ours.delete([route], why="no route")
    assert set(files(repository)) == {"README.md", "clusters/one/flight-delay/v3/configmap-one.yaml"}


@pytest.mark.long
def test_a_cluster_that_does_not_prune_is_told_of(repository, api, tmp_path):
    """A file that is gone does not delete anything by itself."""
    with Argo(repository, api, prune=False).running():
        [one] = hand(repository, tmp_path).apply([config("one", 7, "red")], why="deploy 3")
        with pytest.raises(TargetUnavailable, match=r"ConfigMap/one is still there.*with pruning on"):
            hand(repository, tmp_path, timeout=0.3).delete([one], why="retire 3")


@pytest.mark.long
def test_another_object_of_the_name_is_not_waited_for(repository, api, tmp_path):
    """What was read is gone, whoever has its name now."""
    with Argo(repository, api).running():
        [one] = hand(repository, tmp_path).apply([config("one", 7, "red")], why="deploy 3")
    one["metadata"]["uid"] = "another"
    hand(repository, tmp_path).delete([one], why="retire 3")


def test_a_refused_push_changes_nothing_in_the_cluster(repository, api, tmp_path):
    """Neither here nor there is anything of it, and nobody waits."""
    hook = repository / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    began = time.monotonic()
    with Argo(repository, api).running(), pytest.raises(TargetError, match="refused the push"):
        hand(repository, tmp_path).apply([config("one", 7, "red")], why="no")
    assert time.monotonic() - began < 15
    assert api.get("ConfigMap", "one", "default") is None


def test_a_route_edited_by_hand_has_not_obeyed(repository, api, tmp_path):
    """The digest says that the commit came; in a route that is not enough, for what somebody edits there is traffic."""
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {
            "name": "flight-delay",
            "namespace": "default",
            "labels": names.labels("flight-delay"),
            "annotations": {names.FENCE: "7"},
        },
        "spec": {
            "parentRefs": [{"name": "g"}],
            "rules": [{"backendRefs": [{"name": "a", "port": 8080, "weight": 90}]}],
        },
    }
    argo, ours = Argo(repository, api), hand(repository, tmp_path, timeout=0.3)
    with argo.running():
        hand(repository, tmp_path).apply([route], why="traffic")
    assert "clusters/one/flight-delay/httproute.yaml" in files(repository)
    rules = [{"backendRefs": [{"name": "a", "port": 8080, "weight": 50}]}]
    api.patch("HTTPRoute", "default", "flight-delay", {"spec": {"rules": rules}})
    with pytest.raises(TargetUnavailable, match=r"spec\.rules\[0\]\.backendRefs\[0\]\.weight \(90, there: 50\)"):
        ours.apply([route], why="traffic")


def test_what_the_cluster_would_refuse_is_known_before(repository, api, tmp_path, server):
    """The API server is asked by a dry run; where we may not ask it, the commit decides."""
    wrong = {**config("one", 7, "red"), "colour": "red"}
    with pytest.raises(TargetError, match="colour"):
        hand(repository, tmp_path).check([wrong])
    server.kubeconfig(tmp_path / "kubeconfig", token=server.token("system:serviceaccount:default:reader"))
    hand(repository, tmp_path).check([wrong])


@pytest.mark.long
def test_a_file_that_is_not_ours_any_more_is_not_overwritten(repository, api, tmp_path):
    """Somebody has broken it by hand: that is for a person."""
    Branch(settings(repository)).commit(
        lambda _: {"clusters/one/flight-delay/v3/configmap-one.yaml": b"<<<<<<< HEAD\n"}, "a merge gone wrong"
    )
    with pytest.raises(TargetError, match="is not an object of ours"):
        hand(repository, tmp_path).apply([config("one", 7, "red")], why="no")


def test_a_whole_target_by_commits(repository, server, tmp_path):
    """Deploy, route and retire as ever, and every change is one that the history tells; a stale holder makes none."""
    server.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
    server.kubeconfig(tmp_path / "kubeconfig", namespace="models")
    api, target = Api(tmp_path / "kubeconfig"), at(tmp_path, gitops=settings(repository))
    target._hand._every = 0.02
    fence = target.lease(MODEL, "p-1")
    with Argo(repository, api).running(), KServe(api).running():
        for number in ("1", "2"):
            target.deploy(downloaded(tmp_path, number), fence)
        target.route(Traffic(MODEL, "1", "2", weight=500), fence)
        assert target.traffic(MODEL) == Traffic(MODEL, "1", "2", weight=500)
        told = git(repository, "log", "-1", "--format=%B", "main")
        assert "traffic of flight-delay, by p-1" in told
        assert "challenger 2 gets 5 % of the live requests" in told
        later = target.lease(MODEL, "p-2", take=True)
        before = git(repository, "rev-parse", "main")
        with pytest.raises(StaleFence):
            target.route(Traffic(MODEL, "1"), fence)
        assert git(repository, "rev-parse", "main") == before
        target.route(Traffic(MODEL, "2"), later)
        target.retire(MODEL, "1", later)
        assert set(target.deployed(MODEL)) == {"2"}
    assert not [path for path in files(repository) if "/v1/" in path]
    managers = {one["manager"] for one in api.get("HTTPRoute", MODEL, "models")["metadata"]["managedFields"]}
    assert "titleshot" not in managers
