"""The image: the Dockerfile and the archive made without an engine say the same, and the archive is one that loads."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from deployments.images import build
from deployments.images.build import BuildError, base_from, interpreter, write
from deployments.kubernetes.manifests import USER

DOCKERFILE = (build.ROOT / "deployments/images/Dockerfile").read_text().replace("\\\n", " ")
DATE = 1_600_000_000


def instructions(word: str) -> list[str]:
    return re.findall(rf"^{word} +(.*)$", DOCKERFILE, re.MULTILINE)


def test_the_dockerfile_says_the_same() -> None:
    """Environment, user, directory, command and labels are those of the archive; nothing is fetched by a host's name,
    and the base is pinned."""
    # uv's own settings are those of the builder.
    said = " ".join(text for text in instructions("ENV") if "UV_" not in text)
    assert dict(re.findall(r"(\w+)=(\S+)", said)) == build.ENVIRONMENT
    labels = dict(re.findall(r'([\w.]+)="([^"]*)"', " ".join(instructions("LABEL"))))
    assert labels == build.LABELS
    assert set(instructions("USER")) == {f"{build.USER}:{build.USER}"} == {f"{USER}:{USER}"}
    assert instructions("WORKDIR")[-1] == f"/{build.HOME}"
    stages = re.findall(r"^FROM \S+ AS (\w+)$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    said = {name: found[1] for name, text in stages if (found := re.search(r"^CMD (.*)$", text, re.MULTILINE))}
    assert {name: json.loads(text) for name, text in said.items()} == build.COMMANDS
    assert json.loads(instructions("ENTRYPOINT")[-1]) == []
    base = next(text for text in instructions("ARG") if text.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-\w+", base)
    assert all("://" not in line for line in DOCKERFILE.splitlines())


def test_what_is_copied_into_the_image_is_in_the_context() -> None:
    """.dockerignore lets through what pyproject.toml packages and the Dockerfile names."""
    import tomllib

    allowed = {line[1:] for line in (build.ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((build.ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    wanted = {*packages, "pyproject.toml", "requirements.lock", project["project"]["readme"]}
    assert wanted <= allowed
    assert all((build.ROOT / name).exists() for name in allowed)


def test_the_serving_image_has_what_the_model_servers_import() -> None:
    """serving.txt names the packages that server, recorder and fetcher import, and the lock knows them all."""
    named = {
        line for line in (build.ROOT / "deployments/images/serving.txt").read_text().split("\n") if line[:1].isalpha()
    }
    locked = set(re.findall(r"^([\w.-]+)==", (build.ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert named <= locked
    imported = set()
    for name in ("local/server.py", "recorder.py", "fetch.py", "artifact.py"):
        text = (build.ROOT / "deployments" / name).read_text()
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))
    with_others = {"numpy": "pandas", "multidict": "aiohttp", "yarl": "aiohttp"}
    foreign = {with_others.get(name, name) for name in imported - sys.stdlib_module_names - {"deployments"}}
    assert foreign <= named


def rootfs(folder: Path, *, python: str = "usr/bin/python3.11") -> Path:
    path = folder / "rootfs.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {
            f"./{python}": b"#!",
            "./etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
            "./etc/hostname": b"of-this-machine",
            "./etc/resolv.conf": b"nameserver 192.0.2.1",
            "./dev/null": b"",
            "./var/cache/apt/big": b"x",
        }.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1_500_000_000, "somebody"
            tar.addfile(info, io.BytesIO(content))
    return path


def archive(folder: Path) -> Path:
    work = folder / "work"
    work.mkdir()
    layer, python = base_from(rootfs(folder), work, DATE)
    assert python == "usr/bin/python3.11"
    with build._layer(work, DATE) as (writer, made):
        writer.directory("opt/venv")
        writer.directory(build.HOME, owner=build.USER)
    output = folder / "image.tar"
    write(output, [layer, *made], ["titleshot:latest", "titleshot:0.1.0"], DATE, "0.1.0", ["titleshot", "--help"])
    return output


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[bytes]]:
    with tarfile.open(path) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    (manifest,) = json.loads(files["manifest.json"])
    assert {manifest["Config"], "manifest.json", *manifest["Layers"]} == set(files)
    assert hashlib.sha256(files[manifest["Config"]]).hexdigest() == manifest["Config"].removesuffix(".json")
    return manifest, json.loads(files[manifest["Config"]]), [files[name] for name in manifest["Layers"]]


def test_the_archive_is_an_image_with_right_digests(tmp_path: Path) -> None:
    """Config and layers are named by their digests, the config knows what is in the layers, the tags are there."""
    manifest, config, layers = parts(archive(tmp_path))
    assert manifest["RepoTags"] == ["titleshot:latest", "titleshot:0.1.0"]
    assert [f"{hashlib.sha256(one).hexdigest()}.tar.gz" for one in layers] == manifest["Layers"]
    contents = [gzip.decompress(one) for one in layers]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in contents]
    assert config["config"]["User"] == "10001:10001"
    assert dict(one.split("=", 1) for one in config["config"]["Env"]) == build.ENVIRONMENT
    assert config["config"]["Labels"]["org.opencontainers.image.version"] == "0.1.0"
    assert (config["os"], config["created"]) == ("linux", "2020-09-13T12:26:40Z")


def test_the_base_layer_has_nothing_of_the_machine_that_made_it(tmp_path: Path) -> None:
    """Names of hosts and owners, devices and caches stay out; the image's user is known by name; dates are kept."""
    _, _, layers = parts(archive(tmp_path))
    with tarfile.open(fileobj=io.BytesIO(layers[0])) as tar:
        found = {info.name: info for info in tar}
        assert set(found) == {"usr/bin/python3.11", "etc/passwd"}
        assert {(info.uname, info.mtime) for info in found.values()} == {("", 1_500_000_000)}
        passwd = tar.extractfile("etc/passwd")
        assert passwd is not None
        assert passwd.read().decode().splitlines()[-1].startswith("titleshot:x:10001:10001:")
    with tarfile.open(fileobj=io.BytesIO(layers[1])) as tar:
        assert {info.name: info.uid for info in tar} == {"opt/venv": 0, build.HOME: 10001}


def test_the_same_makes_the_same(tmp_path: Path) -> None:
    """Two archives of the same things are the same bytes."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        archive(tmp_path / name)
    assert (tmp_path / "one/image.tar").read_bytes() == (tmp_path / "two/image.tar").read_bytes()


def test_the_right_python_is_found() -> None:
    """The one that was installed by hand before the system's, the newest of several; too old or none is refused."""
    assert (
        interpreter(["usr/bin/python3.11", "usr/local/bin/python3.13", "usr/bin/python3"]) == "usr/local/bin/python3.13"
    )
    assert interpreter(["usr/bin/python3.9", "usr/bin/python3.12"]) == "usr/bin/python3.12"
    for names, words in ((["usr/bin/python3.9"], "3.11 or newer"), (["bin/sh"], "no Python")):
        with pytest.raises(BuildError, match=words):
            interpreter(names)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"no tar at all", "cannot be read as the tar of a root file system"),
        (None, "cannot be read as the tar of a root file system: .*No such file"),
    ],
)
def test_a_wrong_base_is_refused_in_one_line(tmp_path: Path, given: bytes | None, words: str) -> None:
    """What is no root file system is named, with what is wrong; nothing is written."""
    base, output = tmp_path / "base.tar", tmp_path / "image.tar"
    if given is not None:
        base.write_bytes(given)
    command = [sys.executable, "-m", "deployments.images.build", "--base", str(base), "--output", str(output)]
    done = subprocess.run(command, check=False, cwd=build.ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"titleshot: .*{words}.*\n", done.stderr)
    assert not output.exists()


def test_an_image_is_no_root_file_system(tmp_path: Path) -> None:
    """Who gives what `docker save` writes is told what to give instead."""
    image = archive(tmp_path)
    with pytest.raises(BuildError, match="docker export"):
        base_from(image, tmp_path, DATE)
