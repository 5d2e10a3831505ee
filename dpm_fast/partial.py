"""A file with the sums of an unfinished bound, from which the same call goes on."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpm_fast import files, noise
from dpm_fast.identity import identity
from dpm_fast.sums import Sums

if TYPE_CHECKING:
    from dpm_fast.importance import Importance
    from dpm_fast.model import DiffusionModel

FORMAT = "dpm_fast partial bound 1"
# At a time of a tensor that is fingerprinted, which may be on a GPU or not contiguous.
_ELEMENTS_PER_PIECE = 2**20
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class PartialSums:
    """The file of one bound, which is known by all that its figures follow from.

    Args:
        path: where it is or will be.
        identity: of the bound, plain JSON; see `bound_identity`.

    Raises:
        TypeError: for a path of another type.
        ValueError: for an empty one, or that of a directory.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]):
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"partial must be a path, got {type(path).__name__}")
        if not os.fspath(path):
            raise ValueError("partial must be a path, got an empty one")
        if Path(path).is_dir():
            raise ValueError(f"partial must be a file, got the directory {os.fspath(path)}")
        self.path, self.identity = Path(path), {"format": FORMAT} | identity

    def load(self, sums: Sums) -> None:
        """Bring sums to where the file leaves off; to their beginning where there is none.

        Raises:
            ValueError: for a file that is not of this bound, or damaged.
        """
        if not self.path.exists():
            return
        try:
            # An archive, or ValueError: `np.load` would take other files too, and leave them open.
            with self.path.open("rb") as file:
                arrays = dict(np.lib.npyio.NpzFile(file, allow_pickle=False))
            theirs = json.loads(str(arrays.pop("identity", "null")))
        except _UNREADABLE as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{self.path} must hold partial sums of a bound, got an unreadable file: {reason}"
            ) from None
        self._check(theirs)
        try:
            if any(array.dtype not in (np.float64, np.int64) for array in arrays.values()):
                raise ValueError("arrays must be of float64 and int64")
            sums.restore({name: torch.from_numpy(array) for name, array in arrays.items()})
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from None

    def save(self, sums: Sums) -> None:
        """Replace the file, on the disk when this returns.

        Raises:
            OSError: naming the path and the operating system's reason; what was there is left.
        """
        arrays = {name: x.cpu().numpy() for name, x in sums.state().items()}
        files.write_arrays(self.path, {"identity": np.array(json.dumps(self.identity)), **arrays})

    def _check(self, theirs: Any) -> None:
        if not isinstance(theirs, dict) or theirs.get("format") != FORMAT:
            raise ValueError(f"{self.path} must hold partial sums of a bound, got another format")
        for name in {**self.identity, **theirs}:
            ours, other = self.identity.get(name), theirs.get(name)
            if ours != other:
                what = name.removesuffix("_sha256").replace("_", " ")
                differs = f"{what} {other!r}, not {ours!r}" if what == name else f"other {what}"
                raise ValueError(
                    f"{self.path} holds sums of another bound, with {differs}: name another file, "
                    "or remove it"
                )


def bound_identity(
    model: DiffusionModel,
    x_0: Tensor,
    *,
    example_ids: Tensor,
    timesteps: str | int,
    importance: Importance | None,
    edge: str,
    seed: int,
    draws: int,
) -> dict[str, Any]:
    """What the figures of a bound follow from, except for the rounding of a network's batches."""
    moments = None if importance is None else _sha256([importance.moments])
    return identity(model, model.data) | {
        "network_sha256": _classes(model.network),
        "parameters_sha256": _sha256([*model.parameters(), *model.buffers()]),
        "examples_sha256": _sha256([x_0]),
        "example_ids_sha256": _sha256([example_ids]),
        "timesteps": timesteps,
        "edge": edge,
        "seed": noise.check_seed(seed),
        "draws": draws,
        "importance_sha256": moments,
    }


def _classes(network: object) -> str:
    """Fingerprint of the names of a network's parts, their classes, and what they print of
    themselves."""
    parts = network.named_modules() if isinstance(network, nn.Module) else [("", network)]
    names = [
        (name, type(part).__module__, type(part).__qualname__, _settings(part))
        for name, part in parts
    ]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _settings(part: object) -> tuple[str, bool]:
    return (part.extra_repr(), part.training) if isinstance(part, nn.Module) else ("", False)


def _sha256(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in tensor.detach().reshape(-1).split(_ELEMENTS_PER_PIECE):
            digest.update(memoryview(piece.contiguous().cpu().view(torch.uint8).numpy()))
    return digest.hexdigest()
