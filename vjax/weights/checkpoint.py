"""Safetensors files of a model directory: which they are, what their headers say, and reading one tensor. No jax."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vjax.errors import ModelLoadError
from vjax.weights.mapping import TensorInfo

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: What a repository holds in place of a file that was cloned without Git LFS.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

#: Of safetensors' names.
_NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


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


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


class Checkpoint:
    """An open checkpoint: `tensors` describes all tensors, `read` gives one. Files stay memory-mapped until `close`,
    and as long as a tensor of theirs is in use.

    Raises:
        ModelLoadError: From the constructor: no weights, or a file that is no intact safetensors file; a tensor that
            two files hold.
    """

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self.tensors: dict[str, TensorInfo] = {}
        #: Of each tensor, its bytes in a mapped file.
        self._bytes: dict[str, np.ndarray] = {}
        for path in weight_files(model_dir):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="np"):  # checks the header against the file
                pass
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_size))
            data_start = 8 + header_size
            # Not `safe_open`'s own tensors: these are copies, made with the interpreter's lock held.
            data = np.asarray(np.memmap(path, np.uint8, "r"))
        except (SafetensorError, OSError) as error:
            hint = "It may be truncated; download it again."
            if isinstance(error, SafetensorError) and _is_lfs_pointer(path):
                hint = "It is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned."
            raise ModelLoadError(
                f"{path} is no intact safetensors file ({path.stat().st_size} bytes): {error}. {hint}"
            ) from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self.tensors:
                raise ModelLoadError(f"{path} holds the tensor {name}, and so does {self.tensors[name].file}.")
            start, end = (data_start + offset for offset in entry["data_offsets"])
            self.tensors[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"], path.name)
            self._bytes[name] = data[start:end]

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in its own dtype (bfloat16 from ml_dtypes), read-only: a view of the file, which is read as
        the tensor is.

        Raises:
            ModelLoadError: numpy has no such dtype.
        """
        info = self.tensors[name]
        dtype = _NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise ModelLoadError(
                f"{self.model_dir / info.file}: tensor {name} is of dtype {info.dtype}, which cannot be read; allowed "
                f"are {', '.join(_NUMPY_DTYPES)}."
            )
        # Aligned as safetensors writes it; other writers need not.
        return np.require(self._bytes[name].view(dtype).reshape(info.shape), requirements="A")

    def close(self) -> None:
        self._bytes.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
