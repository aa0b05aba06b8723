"""What a converted folder says of its Orbax checkpoint, and which format a model's weights are in. No jax.

`vjax_orbax/manifest.json` is written last and read first: weights are restored only where it describes exactly the
leaves that the model has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vjax.config.engine_args import LOAD_FORMATS
from vjax.errors import ModelLoadError
from vjax.weights.checkpoint import INDEX_FILE
from vjax.weights.hub import ORBAX_FOLDER
from vjax.weights.mapping import listed
from vjax.weights.packing import Shape

MANIFEST_FILE = "manifest.json"

#: To be raised when the numbers of a leaf change their meaning while its name and shape stay; `tests/weights` compares
#: leaves with the values that they had.
LAYOUT_VERSION = 1

_CONVERT_AGAIN = "If its config.json was changed, restore it; else run `vjax convert MODEL OUTPUT --to orbax` again."


@dataclass(frozen=True)
class StoredLeaf:
    """One leaf of the checkpoint."""

    shape: Shape
    dtype: str
    #: Folder of the Orbax checkpoint that holds it, relative to the manifest.
    part: str


@dataclass(frozen=True)
class Manifest:
    """Describes a checkpoint of leaves.

    Attributes:
        architecture: As config.json names it.
        leaves: name -> where it is, in the model's order.
        files: File of a part, relative to the manifest -> its bytes.
        kv_scales: "k_scale" and "v_scale", `[layers][kv_heads]`, of an fp8 KV cache; empty when there are none.
        layout_version: `LAYOUT_VERSION` of the writer.
    """

    architecture: str
    leaves: Mapping[str, StoredLeaf]
    files: Mapping[str, int]
    kv_scales: Mapping[str, list[list[float]]] = field(default_factory=dict)
    layout_version: int = LAYOUT_VERSION

    def write(self, model_dir: Path) -> None:
        path = model_dir / ORBAX_FOLDER / MANIFEST_FILE
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(model_dir: Path) -> Manifest:
        """Raises: ModelLoadError if there is none, it cannot be read, or it has another layout version."""
        path = model_dir / ORBAX_FOLDER / MANIFEST_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["layout_version"]
            if version != LAYOUT_VERSION:
                raise ModelLoadError(
                    f"{path} has layout version {version}, this vjax reads version {LAYOUT_VERSION}. {_CONVERT_AGAIN}"
                )
            leaves = {
                name: StoredLeaf(tuple(x["shape"]), x["dtype"], x["part"]) for name, x in content["leaves"].items()
            }
            return Manifest(content["architecture"], leaves, dict(content["files"]), content["kv_scales"])
        except FileNotFoundError:
            raise ModelLoadError(
                f"{model_dir} has no Orbax checkpoint of vjax ({ORBAX_FOLDER}/{MANIFEST_FILE}); make one with "
                f"`vjax convert {model_dir} OUTPUT --to orbax`, or leave load_format at 'auto'.",
                parameter="load_format",
            ) from None
        except ModelLoadError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error!r}. {_CONVERT_AGAIN}") from error

    def parts(self) -> dict[str, list[str]]:
        """Part -> names of its leaves, both in order."""
        found: dict[str, list[str]] = {}
        for name, leaf in self.leaves.items():
            found.setdefault(leaf.part, []).append(name)
        return found

    def check_files(self, model_dir: Path) -> None:
        """Raises: ModelLoadError if files of the checkpoint are missing, or are not as long as they were written."""
        folder = model_dir / ORBAX_FOLDER
        wrong = [name for name, size in self.files.items() if _size(folder / name) != size]
        if wrong:
            raise ModelLoadError(
                f"{folder} is not complete: {len(wrong)} of {len(self.files)} files are missing or have another size "
                f"({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}). Copy or download the folder again, or "
                "repeat `vjax convert`."
            )

    def check(self, architecture: str, shapes: Mapping[str, Shape], where: str) -> None:
        """Compares with the model that config.json describes.

        Args:
            architecture: As config.json names it.
            shapes: leaf name -> shape, of all leaves to be restored.
            where: Name of the checkpoint, for the message.

        Raises:
            ModelLoadError: Another architecture; leaves that are missing, unexpected or mis-shaped, all of them listed.
        """
        if architecture != self.architecture:
            raise ModelLoadError(
                f"The Orbax checkpoint in {where} is of {self.architecture}, its config.json says {architecture}. "
                f"{_CONVERT_AGAIN}"
            )
        problems = [
            listed(
                "missing leaves", [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in self.leaves]
            ),
            listed("unexpected leaves", [name for name in self.leaves if name not in shapes]),
            listed(
                "leaves of a wrong shape",
                [
                    f"{name}: {list(self.leaves[name].shape)} in the checkpoint, {list(shape)} from config.json"
                    for name, shape in shapes.items()
                    if name in self.leaves and self.leaves[name].shape != shape
                ],
            ),
        ]
        if any(problems):
            raise ModelLoadError(
                f"The Orbax checkpoint in {where} does not fit the model. {_CONVERT_AGAIN}\n"
                + "\n".join(filter(None, problems))
            )


def stored_format(model_dir: str | Path, load_format: str = "auto") -> str:
    """What to read from a model directory: "safetensors", "orbax" or "dummy" (nothing).

    Args:
        model_dir: Not looked at unless `load_format` is "auto".
        load_format: "auto" is Orbax where there is such a checkpoint and there are no safetensors, else safetensors.

    Raises:
        ModelLoadError: `load_format` is none of `vjax.config.engine_args.LOAD_FORMATS`.
    """
    if load_format not in LOAD_FORMATS:
        raise ModelLoadError(
            f"load_format is {load_format!r}; it must be one of {', '.join(LOAD_FORMATS)}.",
            parameter="load_format",
            value=load_format,
        )
    if load_format != "auto":
        return load_format
    folder = Path(model_dir)
    has_safetensors = (folder / INDEX_FILE).exists() or any(folder.glob("*.safetensors"))
    return "orbax" if (folder / ORBAX_FOLDER / MANIFEST_FILE).is_file() and not has_safetensors else "safetensors"


def files_of(folder: Path) -> dict[str, int]:
    """Every file below the folder, relative to it -> its bytes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
