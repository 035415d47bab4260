"""The digest of a downloaded model: what was admitted is what is loaded. Standard library only, because the
model server reads this file by path, in environments that have nothing else of ours.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

EXCLUDED = frozenset({"registered_model_meta", "__pycache__"})
"""Names that say nothing about the model: MLflow's download adds the first, importing adds the second."""


class UnsafeArtifact(ValueError):
    """The directory is not a plain tree of files: a link leads out of it, or something is neither file nor
    directory.
    """


def digest(path: Path) -> str:
    """Return "sha256:<hex>" over the sorted relative POSIX paths and the bytes of all files below `path`.

    Raises `UnsafeArtifact` for a link that leads out of `path`, `FileNotFoundError` where there is no
    directory.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory")
    total = hashlib.sha256()
    for name, file in sorted(_files(path)):
        size = file.stat().st_size
        # Lengths make the boundary between a name and a content unambiguous.
        total.update(f"{len(name.encode())}:{name}:{size}:".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return f"sha256:{total.hexdigest()}"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    home = root.resolve()
    for entry in root.rglob("*"):
        relative = entry.relative_to(root)
        if EXCLUDED & set(relative.parts):
            continue
        if entry.is_symlink() and not entry.resolve().is_relative_to(home):
            raise UnsafeArtifact(f"{relative} is a link that leads out of the artifact")
        if entry.is_file():
            yield relative.as_posix(), entry
        elif entry.is_symlink() and entry.is_dir():
            # rglob does not walk into links: what they hold would be loaded without being counted.
            raise UnsafeArtifact(f"{relative} is a link to a directory")
        elif not entry.is_dir():
            raise UnsafeArtifact(f"{relative} is neither a file nor a directory")
