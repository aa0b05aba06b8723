"""Safetensors files of a model directory: which they are, what their headers say, and reading one tensor. No jax."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vjax.errors import ModelLoadError
from vjax.weights.mapping import TensorInfo

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint.

    Those that the index names; without an index model.safetensors; without it all `*.safetensors`, except
    `consolidated*`, which hold the same weights in their publisher's own naming.

    Raises:
        ModelLoadError: There are none, the index cannot be read, or files that it names are missing.
    """
    index = model_dir / INDEX_FILE
    if index.exists():
        return _indexed_files(index)
    if (model_dir / SINGLE_FILE).exists():
        return [model_dir / SINGLE_FILE]
    files = sorted(path for path in model_dir.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        others = sorted(
            path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in model_dir.glob(pattern)
        )
        hint = f" It has {', '.join(others[:5])}: convert these to safetensors." if others else ""
        raise ModelLoadError(
            f"{model_dir} has no weights: {SINGLE_FILE} or {INDEX_FILE} with its shards is needed "
            f'(or load_format="dummy" for random weights).{hint}'
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} cannot be read as a safetensors index: {error!r}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelLoadError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing: {', '.join(missing)}. "
            "Download the checkpoint again."
        )
    if not names:
        raise ModelLoadError(f"{index} names no files.")
    return [index.parent / name for name in names]


class Checkpoint:
    """An open checkpoint: `tensors` describes all tensors, `read` loads one. Files stay memory-mapped until `close`.

    Raises:
        ModelLoadError: From the constructor: no weights, or a file that is no intact safetensors file; a tensor that
            two files hold.
    """

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        for path in weight_files(model_dir):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="np")
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path} is no intact safetensors file ({path.stat().st_size} bytes): {error}. It may be truncated; "
                "download it again."
            ) from error
        self._files[path.name] = file
        for name in names:
            if name in self.tensors:
                raise ModelLoadError(f"{path} holds the tensor {name}, and so does {self.tensors[name].file}.")
            view = file.get_slice(name)
            self.tensors[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype(), path.name)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, copied to memory, in its own dtype (bfloat16 from ml_dtypes).

        Raises:
            ModelLoadError: The file cannot be read.
        """
        file = self.tensors[name].file
        try:
            return self._files[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self.model_dir / file}: tensor {name} cannot be read: {error}.") from error

    def close(self) -> None:
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
