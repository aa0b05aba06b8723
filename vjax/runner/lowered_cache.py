"""Lowered programs on disk, next to XLA's compiled ones.

A file's name is a hash of everything that decides the program: versions, every source file, the description of the
step. What is in it begins with its own hash. So a file is right or is not used, and nothing is ever invalidated.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from vjax.log import logger, warning_once

log = logger(__name__)

_PACKAGES = ("vjax", "pallas_kernels")
_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "numpy", "ml-dtypes", "jax-cuda12-plugin", "jax-cuda13-plugin")
_DIGEST_SIZE = hashlib.sha256().digest_size


@functools.cache
def source_digest() -> str:
    """Hash of the sources and tuned configs of vjax and pallas_kernels, as they were when this was first asked."""
    return digest_of(Path(str(files(name))) for name in _PACKAGES)


def digest_of(packages: Iterable[Path]) -> str:
    """Hash of the names and contents of all sources and tuned configs below the folders of packages."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted([*package.rglob("*.py"), *package.rglob("tuned/*.json")]):
            data = path.read_bytes()
            digest.update(f"{package.name}/{path.relative_to(package).as_posix()} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def _versions() -> str:
    found = []
    for name in _DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return f"python {sys.version}, {', '.join(found)}"


class LoweredCache:
    """Exported programs of one step by name. Any number of processes may share the folder.

    Args:
        folder: Is made when the first program is stored.
        description: Names all that decides a program of the step, but for sources, versions and its own name.
    """

    def __init__(self, folder: Path, description: str):
        self._folder = folder
        self._common = "\n".join([_versions(), source_digest(), description])

    def path(self, name: str) -> Path:
        """Where the program of this name is, or would be."""
        return self._folder / hashlib.sha256(f"{self._common}\n{name}".encode()).hexdigest()

    def get(self, name: str) -> bytes | None:
        """The program's bytes, or None where there are none that are whole."""
        try:
            content = self.path(name).read_bytes()
        except OSError:
            return None
        digest, data = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
        return data if hashlib.sha256(data).digest() == digest else None

    def put(self, name: str, data: bytes) -> None:
        """Stores a program; a folder that cannot be written costs one warning."""
        temporary = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                temporary = file.name
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(temporary, self.path(name))
        except OSError as e:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            warning_once(log, f"lowered programs are not kept: cannot write to {self._folder} ({e})")
