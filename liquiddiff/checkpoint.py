"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; checksummed; the previous one kept."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liquiddiff.config import BadInput

DIGEST = 64  # hex characters of SHA-256 that precede the payload
SMALL = 1 << 16  # numbers of a tensor that is written with others: torch.save takes a tenth of a millisecond for each


class Damaged(BadInput):
    """No checkpoint in the folder can be read."""


def save(state: dict[str, Any], folder: Path) -> None:
    """Write `checkpoint.pt`; what was there becomes `checkpoint.prev.pt`. Raises OSError, leaving both as they were."""
    small: dict[torch.dtype, list[Tensor]] = {}
    outline = _outline(state, small)
    buffer = io.BytesIO()
    torch.save({"outline": outline, "small": {dtype: torch.cat(parts) for dtype, parts in small.items()}}, buffer)
    payload = buffer.getbuffer()
    current, temporary = folder / "checkpoint.pt", folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(hashlib.sha256(payload).hexdigest().encode())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if current.exists():
        os.replace(current, folder / "checkpoint.prev.pt")
    os.replace(temporary, current)
    sync_folder(folder)


def load(folder: Path, mine: bool = False) -> dict[str, Any] | None:
    """The newest sound checkpoint on the CPU, or None where there is none. Never executes pickled code.

    The holder of the run's lock says `mine`: a damaged file is then put aside, lest the next `save` keeps it in the
    place of the sound one. Raises Damaged where checkpoints exist but none is sound.
    """
    damaged: list[Path] = []
    found = [path for path in (folder / "checkpoint.pt", folder / "checkpoint.prev.pt") if path.exists()]
    for path in found:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[DIGEST:]).hexdigest().encode() == content[:DIGEST]:
            for other in damaged if mine else []:
                os.replace(other, other.with_suffix(".damaged"))
            state = torch.load(io.BytesIO(memoryview(content)[DIGEST:]), map_location="cpu", weights_only=True)
            return _filled(state["outline"], state["small"]) if "outline" in state else state  # older: as it was
        damaged.append(path)
        print(f"checkpoint {path} is damaged (its checksum does not match), trying the one before", flush=True)
    if found:
        raise Damaged(
            f"every checkpoint in {folder} is damaged; force=true starts again and keeps the old folder aside"
        )
    return None


def _outline(value: Any, small: dict[torch.dtype, list[Tensor]]) -> Any:
    """`value` with a tuple (size, stride, dtype) for every small tensor, whose numbers go to `small`, in order."""
    if isinstance(value, dict):
        return {key: _outline(part, small) for key, part in value.items()}
    if not isinstance(value, Tensor) or value.numel() > SMALL:
        return value
    small.setdefault(value.dtype, []).append(value.detach().cpu().flatten())
    return value.shape, value.stride(), value.dtype


def _filled(outline: Any, small: dict[torch.dtype, Tensor]) -> Any:
    """The inverse of `_outline`; takes what it uses from `small`. Every tensor has memory of its own."""
    if isinstance(outline, dict):
        return {key: _filled(part, small) for key, part in outline.items()}
    if not (isinstance(outline, tuple) and outline and isinstance(outline[0], torch.Size)):
        return outline
    size, stride, dtype = outline
    mine, small[dtype] = small[dtype].split([size.numel(), len(small[dtype]) - size.numel()])
    return torch.empty_strided(size, stride, dtype=dtype).copy_(mine.view(size))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
