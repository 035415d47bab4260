"""Make Titleshot's image as one archive, without a container engine, for whoever loads images by hand.

    python -m deployments.images.build --output titleshot.tar --debootstrap
    ctr -n k8s.io images import titleshot.tar       (or: docker load -i, podman load -i, kind load image-archive)

The archive is what `docker save` writes: a layer with an operating system that has Python, and one with a virtual
environment at /opt/venv. The first comes from `--base` (the tar of a root file system: `docker export`, Debian's
debootstrap or mmdebstrap) or is made with debootstrap, which needs root. The second is made with uv, for that Python.
The same sources and packages make the same archive, byte for byte.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
VENV = "opt/venv"
HOME = "var/lib/titleshot"
SCRATCH = "/tmp"  # noqa: S108 - in the container, where nothing else can be written
USER = 10001
ACCOUNTS = {
    "etc/passwd": f"titleshot:x:{USER}:{USER}::{SCRATCH}:/usr/sbin/nologin\n",
    "etc/group": f"titleshot:x:{USER}:\n",
}
"""Lines that make the user known: ssh and others ask for its name."""
ENVIRONMENT = {
    "PATH": f"/{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": SCRATCH,
    "USER": "titleshot",
    "PREFECT_HOME": f"{SCRATCH}/prefect",
    "TITLESHOT_HOME": f"/{HOME}",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLIENT_METRICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MPLCONFIGDIR": f"{SCRATCH}/matplotlib",
}
"""The image's environment; the Dockerfile has the same."""
COMMANDS = {
    "serving": ["python", "-m", "deployments.local.server", "--help"],
    "worker": ["titleshot", "--help"],
}
"""What runs where nothing is asked for, by target: the smaller one has not what `titleshot` needs."""
LABELS = {
    "org.opencontainers.image.title": "titleshot",
    "org.opencontainers.image.description": "Gated, zero-downtime promotion of models: worker and model servers",
    "org.opencontainers.image.licenses": "Apache-2.0",
}
DEBIAN = "bookworm"
"""The Debian that debootstrap installs: its python3 is 3.11."""
PACKAGES = {
    "serving": ("python3", "ca-certificates", "tzdata"),
    "worker": ("python3", "ca-certificates", "tzdata", "git", "openssh-client"),
}
"""What of Debian is installed, by target."""
EPOCH = 1_577_836_800
"""The date of all files (2020-01-01) where SOURCE_DATE_EPOCH does not say another."""
LEFT_OUT = re.compile(
    r"(?:dev|proc|sys|run|tmp|var/cache|var/log|var/lib/apt/lists|var/lib/apt/periodic)/.+"
    r"|etc/(?:hostname|resolv\.conf|hosts|machine-id)|\.dockerenv|debootstrap(?:/.*)?"
)
"""What of a root file system belongs to the machine that made it, or is of no use in an image."""
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class BuildError(Exception):
    """The image cannot be made: one line that says why, and how to mend it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its compressed file, the digest of that, and of the tar in it (hex)."""

    file: Path
    digest: str
    content: str


class _Tee(io.RawIOBase):
    """Writes to `below` and counts the digest of what goes by."""

    def __init__(self, below: IO[bytes] | gzip.GzipFile) -> None:
        self.below, self.hash = below, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.below.write(data)


class _Writer:
    """Adds members to a layer."""

    def __init__(self, tar: tarfile.TarFile, date: int) -> None:
        self.tar, self.date = tar, date

    def add(self, info: tarfile.TarInfo, content: IO[bytes] | None = None) -> None:
        """Add a member as it is, but for names of owners, which mean nothing in another system."""
        info.uname = info.gname = ""
        self.tar.addfile(info, content)

    def directory(self, name: str, owner: int = 0) -> None:
        """Add an empty directory that belongs to `owner`."""
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.mtime = tarfile.DIRTYPE, 0o755, owner, owner, self.date
        self.add(info)

    def tree(self, root: Path, prefix: str = "", *, since: float | None = None, owners: bool = False) -> None:
        """Add all below `root` as `prefix/...`, sorted. Dates become that of the image: all of them, or, with `since`,
        those after it. Owners become root, unless `owners`.
        """
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if not prefix and LEFT_OUT.fullmatch(name):
                continue
            info = self.tar.gettarinfo(path, f"{prefix}/{name}" if prefix else name)
            if info is None:  # a socket
                continue
            info.mtime = self.date if since is None or info.mtime >= since else int(info.mtime)
            if not owners:
                info.uid = info.gid = 0
                # Whatever mask the files were made under: readable by all, writable by root.
                info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
            if info.isreg():
                with path.open("rb") as content:
                    self.add(info, content)
            else:
                self.add(info)


@contextmanager
def _layer(folder: Path, date: int) -> Iterator[tuple[_Writer, list[Layer]]]:
    """Write a layer into `folder`; it is in the list once the block is done."""
    made: list[Layer] = []
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tar.gz", delete=False) as file:
        outer = _Tee(file)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=outer, mtime=0) as packed:
            inner = _Tee(packed)
            with tarfile.open(fileobj=inner, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                yield _Writer(tar, date), made
    made.append(Layer(Path(file.name), outer.hash.hexdigest(), inner.hash.hexdigest()))


def interpreter(names: Sequence[str]) -> str:
    """The Python among the file names of a system: "usr/bin/python3.11". Raises `BuildError` where there is none."""
    found = [name for name in names if re.fullmatch(r"usr/(?:local/)?bin/python3\.\d+", name)]
    if not found:
        raise BuildError("the base has no Python in /usr/bin or /usr/local/bin: take one that has, 3.11 or newer")
    # The one in /usr/local was put there on purpose.
    best = max(found, key=lambda name: ("local" in name, int(name.rpartition(".")[2])))
    if int(best.rpartition(".")[2]) < 11:
        raise BuildError(f"the base's Python is {best.rpartition('python')[2]}: Titleshot needs 3.11 or newer")
    return best


def base_from(archive: Path, folder: Path, date: int) -> tuple[Layer, str]:
    """The layer of a root file system's tar (compressed or not), and the Python in it."""
    names = []
    try:
        with (
            tarfile.open(archive, mode="r|*") as source,
            _layer(folder, date) as (writer, made),
        ):
            for info in source:
                info.name = os.path.normpath(info.name).lstrip("/")
                if info.name == "." or LEFT_OUT.fullmatch(info.name):
                    continue
                names.append(info.name)
                content: IO[bytes] | None = source.extractfile(info) if info.isreg() else None
                if content and info.name in ACCOUNTS:
                    content = io.BytesIO(content.read() + ACCOUNTS[info.name].encode())
                    info.size = content.getbuffer().nbytes
                writer.add(info, content)
    except (tarfile.TarError, OSError) as error:
        raise BuildError(f"{archive} cannot be read as the tar of a root file system: {error}") from error
    if "manifest.json" in names or "index.json" in names:
        raise BuildError(f"{archive} is an image, not a root file system: `docker export` of a container makes one")
    return made[0], interpreter(names)


def base_made(target: str, folder: Path, date: int, mirror: str | None) -> tuple[Layer, str]:
    """The layer of a small Debian made with debootstrap, and the Python in it."""
    if shutil.which("debootstrap", path=_path()) is None:
        raise BuildError(
            "there is no debootstrap here: install it (Debian, Ubuntu: apt-get install debootstrap), or use --base"
        )
    if os.geteuid() != 0:
        raise BuildError("debootstrap needs root: run this with sudo, or use --base")
    root, began = folder / "root", time.time()
    packages = ",".join(PACKAGES[target])
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, str(root)]
    _run([*command, *([mirror] if mirror else [])])
    for name, line in ACCOUNTS.items():
        with (root / name).open("a") as file:
            file.write(line)
    with _layer(folder, date) as (writer, made):
        # Files of Debian's packages keep their dates, by which Python knows that its compiled modules are current.
        writer.tree(root, since=began - 1, owners=True)
    found = interpreter([path.relative_to(root).as_posix() for path in root.glob("usr/**/bin/python3.*")])
    shutil.rmtree(root)
    return made[0], found


def packages(target: str, python: str, folder: Path, date: int) -> Layer:
    """The layer with the virtual environment: the lock's packages and ours, for the base's interpreter `python`."""
    venv, minor = folder / "venv", python.rpartition("python")[2]
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), _path())))
    if uv is None:
        raise BuildError("there is no uv here: install it with `python -m pip install uv`")
    _run([uv, "venv", "--quiet", "--relocatable", "--python", minor, str(venv)])
    wanted = ["-r", str(ROOT / "deployments/images/serving.txt")]
    if target == "worker":
        wanted = ["-r", str(ROOT / "pyproject.toml"), "--extra", "kubernetes", "--extra", "signing"]
    install = [uv, "pip", "install", "--quiet", "--python", str(venv / "bin/python"), "--link-mode", "copy"]
    # Wheels for any system with glibc 2.31 or newer: the base's may be older than this machine's.
    wheels = ["--python-platform", f"{platform.machine()}-manylinux_2_31", "--only-binary", ":all:"]
    _run([*install, *wheels, "--constraint", str(ROOT / "requirements.lock"), *wanted])
    _run([uv, "build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT)])
    _run([*install, "--no-deps", "--no-index", "--find-links", str(folder), "titleshot"])
    _only_locked(venv)
    library = venv / "lib" / f"python{minor}" / "site-packages"
    for path in library.rglob("__pycache__"):
        shutil.rmtree(path)
    for path in library.glob("*.dist-info/uv_cache.json"):  # when the wheel was made
        path.unlink()
        record = path.with_name("RECORD")
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if "uv_cache.json" not in line))
    # Compiled modules that say nothing about dates: those in the image are not those of this machine.
    compile_all = ["-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    # The path in a traceback is the one in the image. Some packages carry files for other Pythons, which fail.
    places = ["-s", str(venv), "-p", f"/{VENV}", str(library)]
    subprocess.run(
        [venv / "bin/python", *compile_all, *places], check=False, stdout=subprocess.DEVNULL, env=_environment()
    )
    for path in (venv / "bin").iterdir():
        if path.name.startswith(("activate", "python", "deactivate", "pydoc")):
            path.unlink()
    for name, to in (("python", f"/{python}"), ("python3", "python"), (f"python{minor}", "python")):
        (venv / "bin" / name).symlink_to(to)
    home = Path("/", python).parent
    (venv / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\nversion_info = {minor}\n")
    with _layer(folder, date) as (writer, made):
        for name in ("opt", VENV):
            writer.directory(name)
        writer.tree(venv, VENV)
        writer.directory(HOME, owner=USER)
    shutil.rmtree(venv)
    return made[0]


def _only_locked(venv: Path) -> None:
    """Refuse packages that the lock does not name: whatever was newest today."""
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    here = {
        re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower() for path in venv.glob("lib/*/site-packages/*.dist-info")
    }
    extra = sorted(here - {re.sub(r"[-_.]+", "-", name).lower() for name in locked} - {"titleshot"})
    if extra:
        raise BuildError(f"requirements.lock has no {', '.join(extra)}: bring it up to date with pyproject.toml")


def write(
    output: Path, layers: Sequence[Layer], tags: Sequence[str], date: int, version: str, command: Sequence[str]
) -> str:
    """Write the archive of an image that runs `command`, and return its id, "sha256:<hex>"."""
    made = datetime.fromtimestamp(date, UTC).isoformat().replace("+00:00", "Z")
    config = {
        "created": made,
        "architecture": MACHINES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "User": f"{USER}:{USER}",
            "Env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
            "Cmd": [*command],
            "WorkingDir": f"/{HOME}",
            "Labels": {**LABELS, "org.opencontainers.image.version": version},
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.content}" for layer in layers]},
        "history": [{"created": made, "created_by": "deployments.images.build"} for _ in layers],
    }
    text = json.dumps(config, separators=(",", ":")).encode()
    number = hashlib.sha256(text).hexdigest()
    entry = {"Config": f"{number}.json", "RepoTags": [*tags], "Layers": [f"{layer.digest}.tar.gz" for layer in layers]}
    part = output.with_name(f"{output.name}.part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        writer = _Writer(tar, date)
        for name, content in ((f"{number}.json", text), ("manifest.json", json.dumps([entry]).encode())):
            _put(writer, name, len(content), io.BytesIO(content))
        for layer in layers:
            with layer.file.open("rb") as content_of:
                _put(writer, f"{layer.digest}.tar.gz", layer.file.stat().st_size, content_of)
    part.replace(output)
    return f"sha256:{number}"


def _put(writer: _Writer, name: str, size: int, content: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, writer.date, 0o644
    writer.add(info, content)


def _path() -> str:
    """Where programs are; debootstrap is where many users' path does not lead."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _environment() -> dict[str, str]:
    """The environment of what we start: as ours, but sets and dictionaries come in the same order every time."""
    return {**os.environ, "PATH": _path(), "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": str(_date())}


def _date() -> int:
    return int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.strip()][-12:]
        raise BuildError("\n".join((f"`{Path(command[0]).name} {command[1]}` failed:", *last)))


def build(output: Path, tags: Sequence[str], target: str, base: Path | None, mirror: str | None = None) -> str:
    """Make the image at `output` and return its id. Needs twice the image's size in the temporary directory."""
    date = _date()
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory(prefix="image.") as made:
        folder = Path(made)
        system, python = base_from(base, folder, date) if base else base_made(target, folder, date, mirror)
        layers = (system, packages(target, python, folder, date))
        return write(output, layers, tags, date, version[1] if version else "", COMMANDS[target])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.images.build", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("titleshot.tar"), help="the archive to write")
    parser.add_argument(
        "--tag", action="append", help="the image's name (titleshot:latest); may be given several times"
    )
    parser.add_argument(
        "--target", choices=tuple(PACKAGES), default="worker", help="worker: all; serving: model servers only"
    )
    parser.add_argument("--mirror", help="where debootstrap finds Debian, instead of its own default")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base", type=Path, help="the tar of a root file system with Python 3.11 or newer")
    source.add_argument("--debootstrap", action="store_true", help="make the base with Debian's debootstrap")
    given = parser.parse_args(arguments)
    try:
        number = build(given.output, given.tag or ["titleshot:latest"], given.target, given.base, given.mirror)
    except (BuildError, OSError) as error:
        sys.exit(f"titleshot: {error}")
    size = given.output.stat().st_size / 1e6
    sys.stdout.write(f"{given.output}: {size:,.0f} MB, {', '.join(given.tag or ['titleshot:latest'])}, {number}\n")


if __name__ == "__main__":
    main()
