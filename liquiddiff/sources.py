"""Where images come from: a set known by name, a folder of images, or parquet files. Nothing is decoded here."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from liquiddiff.config import BadInput, Data, choose

Content = bytes | Path | np.ndarray  # an encoded image, its file, or grey values as uint8 (H, W)
Items = Iterator[tuple[str, Content]]  # each with a name to show
Load = Callable[[], tuple[int, Items]]  # how many at most, and the images

IMAGE_SUFFIXES = frozenset(
    ".apng .avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
PATIENCE = 3  # seconds for the hub to answer
AFHQ_CLASSES = ["cat", "dog", "wild"]  # for a copy whose labels lost their names


class Named(NamedTuple):
    """A set that is known by name: where it is on the hub, and which of its classes belong to it."""

    hub: str | None
    only: str | None = None


NAMED = {
    "digits": Named(None),  # comes with scikit-learn
    "cifar10": Named("uoft-cs/cifar10"),
    "flowers": Named("huggan/flowers-102-categories"),
    "celebahq": Named("huggan/CelebA-HQ"),
    "afhq": Named("huggan/AFHQv2"),
    "afhq_cat": Named("huggan/AFHQv2", only="cat"),
    "folder": Named(None),  # whatever data.path holds
}


def find(data: Data) -> tuple[list[Any], Load]:
    """Name what identifies the images (JSON), and a function that loads them, which is called only when it must be.

    Raises BadInput for an unknown set and for a path that is missing, unreadable or holds no images.
    """
    if data.path is None:
        named = NAMED[choose("data set", data.name, NAMED)]
        if named.hub:
            return [named], partial(_hub, named.hub, named.only)
        if data.name == "folder":
            raise BadInput("data=folder needs data.path=DIR, a folder of images or parquet files")
        return [data.name], _digits
    only = NAMED.get(data.name, NAMED["folder"]).only
    root = Path(data.path).expanduser().resolve()
    try:
        files = _files(root, only)
        stats = [(str(file.relative_to(root)), file.stat()) for file in files]
    except OSError as error:
        hint = "give a readable folder of images or of parquet files, or one parquet file"
        raise BadInput(f"data.path={data.path} cannot be read ({error.strerror}: {error.filename}): {hint}") from error
    identity = [str(root), only, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if not files:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise BadInput(
            f"data.path={data.path} holds no images: give a folder with files of these kinds: .parquet {kinds}"
        )
    if not parquet:
        return identity, lambda: (len(files), ((str(file.relative_to(root)), file) for file in files))
    if len(parquet) < len(files):
        raise BadInput(f"data.path={data.path} holds both parquet files and images: give the subfolder that is meant")
    return identity, partial(_parquet, parquet, only)


def _files(root: Path, only: str | None) -> list[Path]:
    """List images and parquet files under `root`, sorted, without hidden ones. Raises OSError."""
    if root.is_file() and root.suffix.lower() == ".parquet":
        return [root]

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not read

    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names if not name.startswith(".") and name != "metadata.parquet"]
    found = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES | {".parquet"})
    return [file for file in found if only in file.relative_to(root).parts[:-1]] or found  # cat/ beside dog/ and wild/


def _digits() -> tuple[int, Items]:
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)  # 0 .. 16 in the file
    return len(images), ((f"digit {i}", image) for i, image in enumerate(images))


def _parquet(files: list[Path], only: str | None) -> tuple[int, Items]:
    import pyarrow.parquet as pq

    def rows() -> Items:
        import datasets

        for file in files:  # one at a time: splits may differ in their other columns
            try:
                # Streamed: an Arrow copy beside the memmap would cost the disk a second time, wherever HF_HOME is.
                with TemporaryDirectory() as scratch:
                    dataset = datasets.load_dataset(
                        "parquet", data_files=[str(file)], split="train", streaming=True, cache_dir=scratch
                    )
                yield from _rows(dataset, file, only)
            except (OSError, ValueError) as error:
                if isinstance(error, BadInput):
                    raise
                raise BadInput(f"{file} cannot be read ({line(error)}): fetch it again") from error

    total = 0
    for file in files:
        try:
            total += pq.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            raise BadInput(f"{file} is not a whole parquet file ({line(error)}): fetch it again") from error
    return total, rows()


def _hub(name: str, only: str | None) -> tuple[int, Items]:
    import datasets

    with _offline_if_silent(datasets.config) as silent:
        try:
            splits = datasets.load_dataset(name)
        except Exception as error:  # whatever the hub, its client or its transport raise, the way out is the same
            hint = "connect to the internet, or give a local copy with data.path=DIR"
            why = f"no answer from {datasets.config.HF_ENDPOINT}" if silent else line(error)
            raise BadInput(f"cannot load {name} from the Hugging Face hub ({why}): {hint}") from error
    parts = [splits[split] for split in sorted(splits)]
    return sum(map(len, parts)), (item for part in parts for item in _rows(part, Path(name), only))


@contextmanager
def _offline_if_silent(config: Any) -> Iterator[bool]:
    """Load only what the hub's cache holds if the hub does not answer: its own retries take half a minute to fail."""
    from huggingface_hub import constants

    answers = []

    def probe() -> None:
        try:
            urlopen(Request(config.HF_ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
        except HTTPError as error:  # an answer too
            error.close()
        except (OSError, HTTPException, ValueError):
            return
        answers.append(True)

    if not config.HF_HUB_OFFLINE:
        thread = Thread(target=probe, daemon=True)  # a thread, because no timeout covers a name server that is silent
        thread.start()
        thread.join(PATIENCE)
    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE  # read from the environment when they were imported
    try:
        if not answers:
            config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        yield not answers
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _rows(dataset: Any, where: Path, only: str | None) -> Items:
    """Yield the image column of a data set, of one class where `only` says so and there are labels."""
    import datasets

    features = dataset.features
    typed = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    structs = [key for key, kind in features.items() if isinstance(kind, dict) and {"bytes", "path"} <= set(kind)]
    usual = [key for key in ("image", "img") if key in features]
    candidates = [key for key in usual if key in typed + structs] + typed + structs + usual
    if not candidates:
        raise BadInput(f"{where} has no image column; its columns: {', '.join(features)}")
    column = candidates[0]
    classes = getattr(features.get("label"), "names", AFHQ_CLASSES)
    keep = {only, classes.index(only)} if only in classes and "label" in features else None
    dataset = dataset.select_columns([column, "label"] if keep else [column])
    if column in typed:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))  # broken ones are counted where we decode
    for i, row in enumerate(dataset):
        if keep is None or row["label"] in keep:
            value = row[column]
            if isinstance(value, str):  # a path beside the parquet file, as a struct's
                value = {"path": value, "bytes": None}
            name, content = (value["path"], value["bytes"]) if isinstance(value, dict) else (None, value)
            yield name or f"{where.name} row {i}", content if content is not None else where.parent / (name or "")


def some(names: list[str]) -> str:
    """Show the first five names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def line(error: Exception) -> str:
    """Show an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
