"""A hand that commits: objects become files in a git repository, and Argo CD or Flux brings them into the cluster.

Commits are made without a working tree, from the branch's newest commit, and git refuses a push that is no
fast-forward: so what others commit is never lost, and where a push fails there is nothing left behind.

The program `git` does it, not a library: credentials, proxies, SSH and signing are then what they are for everybody in
the team. It never asks for a password here: what it is not given it does without.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import yaml

from deployments.kubernetes import names
from deployments.kubernetes.client import Client, Forbidden
from deployments.kubernetes.cluster import Cluster, GitOps, Json
from deployments.kubernetes.rendering import file_of, text_of
from deployments.target import StaleFence, TargetError, TargetUnavailable

CONTENT = f"{names.GROUP}/content"
"""The annotation with the digest of what was committed: an object that has it in the cluster has obeyed."""
ATTEMPTS = 8
"""How often a commit is made anew because somebody else's came first."""
PATIENCE = 120.0
"""Seconds that one call of git may take."""
_API_SERVERS_OWN = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid")
_OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")
_REFUSALS = (
    "authentication failed",
    "permission denied",
    "could not read username",
    "could not read password",
    "terminal prompts disabled",
    "host key verification failed",
    "repository not found",
    "dubious ownership",
    "does not appear to be a git repository",
    "returned error: 401",
    "returned error: 403",
)
_RACES = ("non-fast-forward", "fetch first", "stale info", "cannot lock ref", "failed to update ref", "incorrect old")
_QUANTITY = re.compile(r"([+-]?\d+(?:\.\d*)?)(m|[kMGTPE]|[KMGTPE]i)?")
_POWERS = {"m": Decimal("0.001")} | {
    unit: Decimal(base) ** power
    for base, suffix in ((1000, ""), (1024, "i"))
    for power, letter in enumerate("KMGTPE", start=1)
    for unit in ({letter + suffix} | ({"k"} if letter + suffix == "K" else set()))
}

Changes = Mapping[str, bytes | None]
"""Path in the repository to what it holds; None takes the file away."""


class Head(Protocol):
    """The newest commit of a branch, as far as it can be read."""

    def read(self, path: str) -> bytes | None:
        """What a file holds; None where there is none."""

    def below(self, folder: str) -> list[str]:
        """The paths of all files in a folder and in those below it."""


class Branch:
    """One branch of a repository elsewhere, and commits to it. Several threads may share one."""

    def __init__(self, settings: GitOps) -> None:
        self.url, self.name = settings.repository, settings.branch
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def commit(self, change: Callable[[Head], Changes], message: str) -> str:
        """Commit what `change` says and return the commit; the newest one where that changes nothing.

        `change` is given the branch's newest commit, and called anew where somebody else's came first. What it raises
        is raised. `TargetUnavailable` where the repository cannot be reached or others are always faster,
        `TargetError` where it refuses.
        """
        with self._lock:
            for attempt in range(ATTEMPTS):
                head = self._fetch()
                changes = change(_Commit(self._git, head))
                commit = self._committed(head, changes, message) if changes else head
                if commit is None or commit == head or self._pushed(commit):
                    return commit or ""
                time.sleep(random.uniform(0, 0.1) * 2**attempt)  # noqa: S311
        raise TargetUnavailable(f"{ATTEMPTS} times somebody else's commit to {self.name} of {self._said} came first")

    @property
    def _said(self) -> str:
        return _without_secrets(self.url)

    @property
    def _directory(self) -> str:
        assert self._made is not None
        return self._made.name

    def _fetch(self) -> str | None:
        """The newest commit; None in a repository without any."""
        if self._made is None:
            self._made = tempfile.TemporaryDirectory(prefix="titleshot-git-", ignore_cleanup_errors=True)
            self._git("init", "--quiet", "--bare", ".")
        done = self._run("fetch", "--quiet", "--depth=1", "--no-tags", "--", self.url, f"refs/heads/{self.name}")
        if done.returncode == 0:
            return self._git("rev-parse", "--verify", "FETCH_HEAD").decode().strip()
        if "couldn't find remote ref" not in _text(done.stderr).lower():
            raise self._refused("fetch from", done)
        if self._git("ls-remote", "--", self.url).strip():
            raise TargetError(f"{self._said} has no branch {self.name}: say the right one in gitops.branch")
        return None

    def _committed(self, head: str | None, changes: Changes, message: str) -> str:
        index = {"GIT_INDEX_FILE": str(Path(self._directory) / f"index-{uuid.uuid4().hex}")}
        if head is not None:
            self._git("read-tree", head, env=index)
        lines = []
        for path, content in changes.items():
            blob = (
                "0" * 40
                if content is None
                else self._git("hash-object", "-w", "--stdin", given=content).decode().strip()
            )
            lines.append(f"{'0' if content is None else '100644'} {blob}\t{path}\0".encode())
        self._git("update-index", "-z", "--index-info", env=index, given=b"".join(lines))
        tree = self._git("write-tree", env=index).decode().strip()
        Path(index["GIT_INDEX_FILE"]).unlink(missing_ok=True)
        if head is not None and tree == self._git("rev-parse", f"{head}^{{tree}}").decode().strip():
            return head
        signed = self._git("config", "--type=bool", "--default=false", "commit.gpgsign").strip() == b"true"
        arguments = ["commit-tree", tree, *(["-S"] if signed else []), *(["-p", head] if head else [])]
        return self._git(*arguments, given=message.encode()).decode().strip()

    def _pushed(self, commit: str) -> bool:
        """Whether the branch is at `commit` now; False where somebody else was faster."""
        done = self._run("push", "--porcelain", "--", self.url, f"{commit}:refs/heads/{self.name}")
        if done.returncode == 0:
            return True
        rejected = [line for line in _text(done.stdout).splitlines() if line.startswith("!")]
        if any(race in line for line in rejected for race in _RACES):
            return False
        if rejected:
            raise TargetError(f"{self._said} refused the push to {self.name}: {_last(rejected[0], _text(done.stderr))}")
        raise self._refused("push to", done)

    def _refused(self, what: str, done: subprocess.CompletedProcess[bytes]) -> TargetError:
        said = _text(done.stderr)
        final = any(word in said.lower() for word in _REFUSALS)
        return (TargetError if final else TargetUnavailable)(f"cannot {what} {self._said}: {_last(said)}")

    def _git(self, *arguments: str | None, given: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
        done = self._run(*(one for one in arguments if one is not None), given=given, env=env)
        if done.returncode:
            raise self._refused(f"{arguments[0]} for", done)
        return done.stdout

    def _run(
        self, *arguments: str, given: bytes = b"", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """One call of git, with its output; killed with all its children where it does not end."""
        try:
            process = subprocess.Popen(
                ["git", *arguments],
                cwd=self._directory,
                env={**_environment(), **(env or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise TargetError("the program git is not installed here: target.gitops needs it") from error
        with process:
            try:
                out, err = process.communicate(given, timeout=PATIENCE)
            except subprocess.TimeoutExpired as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise TargetUnavailable(f"git {arguments[0]} did not end within {PATIENCE:.0f} s") from error
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class _Commit:
    """One commit of a repository that is here, or the state before the first."""

    def __init__(self, git: Callable[..., bytes], name: str | None) -> None:
        self._git, self._name = git, name

    def read(self, path: str) -> bytes | None:
        """See `Head`."""
        listed = self._list("-z", path)
        return self._git("cat-file", "blob", listed.split()[2].decode()) if listed else None

    def below(self, folder: str) -> list[str]:
        """See `Head`."""
        return [path for path in self._list("-z", "-r", "--name-only", f"{folder}/").decode().split("\0") if path]

    def _list(self, *arguments: str) -> bytes:
        *how, path = arguments
        return self._git("ls-tree", *how, self._name, "--", path) if self._name is not None else b""


class Committed:
    """Changes a cluster by commits, and waits until it has obeyed them (at most `gitops.timeout` seconds).

    It only reads from the API server: leases and journals are written there by who holds the lease, never by git.
    """

    def __init__(self, client: Client, cluster: Cluster, *, every: float = 1.0) -> None:
        if cluster.gitops is None:
            raise ValueError(f"cluster {cluster.name} has no gitops settings")
        self._client, self._settings, self._every = client, cluster.gitops, every
        self._folder = _folder(cluster.gitops.path)
        self._branch = Branch(cluster.gitops)

    def check(self, objects: Sequence[Json]) -> None:
        """Let the API server say what it would refuse (a server-side dry run), where we have the right to ask."""
        for one in objects:
            with contextlib.suppress(Forbidden):
                self._client.apply(_bare(one), dry_run=True)

    def apply(self, objects: Sequence[Json], *, why: str) -> list[Json]:
        """Commit them, all at once, and wait until the cluster has them; returns them as it has them then.

        Raises `StaleFence` where the repository or the cluster has one of them from a later lease, `TargetUnavailable`
        where the cluster does not obey in time.
        """
        wanted = [_marked(_bare(one)) for one in objects]

        def change(head: Head) -> Changes:
            for one in wanted:
                _still_ours(one, head.read(self._path(one)))
            return {self._path(one): text_of(one).encode() for one in wanted}

        commit = self._branch.commit(change, _message(why, wanted))
        self._wait(wanted, self._obeyed, f"{commit[:10]} ({why})", "")
        return [self._found(one) or one for one in wanted]

    def delete(self, objects: Sequence[Json], *, why: str) -> None:
        """Commit that they are gone, and wait until the cluster has let them go. With the first of a version's objects
        all of its folder goes: else the cluster would have to obey a commit for each of them.

        Raises `StaleFence` where the repository has something there from a later lease than what was read.
        """

        def change(head: Head) -> Changes:
            gone: dict[str, None] = {}
            for one in objects:
                path = PurePosixPath(self._path(one))
                version = names.VERSION in one["metadata"].get("labels", {})
                for file in head.below(str(path.parent)) if version else [str(path)]:
                    if (text := head.read(file)) is not None:
                        _still_ours(one, text)
                        gone[file] = None
            return gone

        commit = self._branch.commit(change, _message(why, ()))
        self._wait(objects, self._gone, f"{commit[:10]} ({why})", " with pruning on")

    def _path(self, one: Json) -> str:
        return str(self._folder / file_of(one))

    def _found(self, one: Json) -> Json | None:
        meta = one["metadata"]
        return self._client.get(one["kind"], meta["name"], meta.get("namespace"))

    def _obeyed(self, one: Json) -> str:
        """What the cluster has otherwise; empty where it has obeyed."""
        found = self._found(one)
        if found is None:
            return "is not there"
        fence, theirs = _fence(one), _fence(found)
        if theirs > fence:
            raise StaleFence(f"{_called(one)} was changed under lease {theirs}, ours is {fence}")
        other = difference(_compared(one), found)
        marked = found["metadata"].get("annotations", {}).get(CONTENT) == one["metadata"]["annotations"][CONTENT]
        # What others fill in on the way (webhooks: an image's registry, resources) is theirs; not so in a route.
        if marked and (other is None or one["kind"] != "HTTPRoute"):
            return ""
        return f"differs in {other}" if other is not None else "has the content of another commit"

    def _gone(self, one: Json) -> str:
        """Why an object is not gone; empty where it is, or is going, or is another one of the same name by now."""
        found = self._found(one)
        if found is None or "deletionTimestamp" in found["metadata"]:
            return ""
        uid = one["metadata"].get("uid")
        return "" if uid is not None and uid != found["metadata"].get("uid") else "is still there"

    def _wait(self, objects: Sequence[Json], missing: Callable[[Json], str], commit: str, how: str) -> None:
        end = time.monotonic() + self._settings.timeout
        waiting = list(objects)
        while True:
            late = [(one, why) for one in waiting if (why := missing(one))]
            if not late:
                return
            if time.monotonic() >= end:
                which = "; ".join(f"{_called(one)} {why}" for one, why in late[:3])
                more = f" (and {len(late) - 3} more)" if len(late) > 3 else ""
                raise TargetUnavailable(
                    f"commit {commit} is in {self._settings.branch} of"
                    f" {_without_secrets(self._settings.repository)}, and {self._settings.timeout:g} s later the"
                    f" cluster has not obeyed: {which}{more}."
                    f" Does Argo CD or Flux apply {self._folder}{how}?"
                )
            waiting = [one for one, _ in late]
            time.sleep(min(self._every, max(end - time.monotonic(), 0.01)))


def difference(wanted: Any, found: Any, at: str = "") -> str | None:
    """Where `found` is not what is `wanted`, as a path and both values; None where it has all of it, and maybe more.

    Lists are of one length. Quantities are compared by what they mean: an API server writes "1000m" as "1".
    """
    if isinstance(wanted, dict) and isinstance(found, dict):
        return next((said for key in wanted if (said := _member(wanted, found, key, at)) is not None), None)
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        places = enumerate(zip(wanted, found, strict=True))
        return next((said for i, (a, b) in places if (said := difference(a, b, f"{at}[{i}]")) is not None), None)
    return None if _same(wanted, found) else f"{at} ({_short(wanted)}, there: {_short(found)})"


def _member(wanted: Json, found: Json, key: str, at: str) -> str | None:
    path = f"{at}.{key}" if at else key
    if key not in found:
        # An API server leaves out what is empty.
        return None if wanted[key] in (None, "", [], {}) else f"{path} ({_short(wanted[key])}, there: nothing)"
    return difference(wanted[key], found[key], path)


def _same(one: object, other: object) -> bool:
    if one == other:
        return True
    a, b = _quantity(one), _quantity(other)
    return a is not None and a == b


def _quantity(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = _QUANTITY.fullmatch(str(value))
    return None if match is None else Decimal(match[1]) * (_POWERS[match[2]] if match[2] else 1)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bare(one: Json) -> Json:
    """An object without what only an API server writes."""
    meta = {key: value for key, value in one["metadata"].items() if key not in _API_SERVERS_OWN}
    return {key: value for key, value in {**one, "metadata": meta}.items() if key != "status"}


def _marked(one: Json) -> Json:
    """An object with the digest of its content as an annotation."""
    meta = one["metadata"]
    kept = {key: value for key, value in meta.get("annotations", {}).items() if key != CONTENT}
    plain = {**one, "metadata": {**meta, "annotations": kept}}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return {**plain, "metadata": {**meta, "annotations": {**kept, CONTENT: f"sha256:{digest}"}}}


def _compared(one: Json) -> Json:
    """What of an object is compared with the cluster's: what it is called is known, and what marks it was."""
    return {key: value for key, value in one.items() if key not in {"apiVersion", "kind", "metadata"}}


def _still_ours(one: Json, text: bytes | None) -> None:
    """Raise `StaleFence` where the repository has `one` from a later lease."""
    if text is None:
        return
    try:
        there = yaml.safe_load(text)
        theirs = _fence(there)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise TargetError(
            f"the file of {_called(one)} in the repository is not an object of ours: mend it or remove it"
        ) from error
    if theirs > _fence(one):
        raise StaleFence(f"{_called(one)} was committed under lease {theirs}, ours is {_fence(one)}")


def _fence(one: Json) -> int:
    return int((one.get("metadata") or {}).get("annotations", {}).get(names.FENCE, 0))


def _called(one: Json) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def _message(why: str, objects: Sequence[Json]) -> str:
    """What the history says: why, and under which lease and promotion `objects` are as they are."""
    said = {}
    for key, title in ((names.PROMOTION, "Promotion"), (names.FENCE, "Lease")):
        values = {one["metadata"].get("annotations", {}).get(key, "") for one in objects} - {""}
        said[title] = ", ".join(sorted(values))
    trailers = "\n".join(f"Titleshot-{title}: {value}" for title, value in said.items() if value)
    routes = [json.loads(text) for one in objects if (text := one["metadata"]["annotations"].get(names.TRAFFIC))]
    parts = [" ".join(why.split()), *map(_told, routes), trailers]
    return "\n\n".join(part for part in parts if part) + "\n"


def _told(traffic: Json) -> str:
    """A route's traffic in a line, for who reads the history."""
    if traffic.get("challenger") is None:
        return f"Champion {traffic['champion']} serves."
    shares = (
        f"{traffic.get('weight', 0) / 100:g} % of the live requests, copies of {traffic.get('mirror', 0) / 100:g} %"
    )
    return f"Champion {traffic['champion']} serves, challenger {traffic['challenger']} gets {shares}."


def _folder(path: str) -> PurePosixPath:
    folder = PurePosixPath(path)
    if folder.is_absolute() or ".." in folder.parts or ".git" in folder.parts:
        raise TargetError(f"gitops.path is {path!r}: it must be a folder inside the repository")
    return folder


def _environment() -> dict[str, str]:
    """What git is told: never to ask anybody, to speak English, and who commits where the user has not said it."""
    who = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", names.MANAGER), ("EMAIL", f"{names.MANAGER}@{names.GROUP}.invalid"))
    }
    # Begun from a hook of another repository, we would write into that one.
    inherited = {key: value for key, value in os.environ.items() if key not in _OF_ANOTHER_REPOSITORY}
    return {**who, **inherited, "GIT_DIR": ".", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def _text(output: bytes) -> str:
    return _without_secrets(output.decode(errors="replace"))


def _without_secrets(text: str) -> str:
    """Addresses lose what stands before the "@": it may be a password."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)


def _last(*texts: str) -> str:
    """The end of what was said, on one line."""
    said = " ".join(" ".join(text.split()) for text in texts if text.strip())
    return said if len(said) <= 400 else f"... {said[-400:]}"
