"""Real data for the examples and benchmarks: scikit-learn's digits and Fashion-MNIST."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Split = tuple[Tensor, Tensor, Tensor, Tensor]

_PREFIXES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),  # Debian's package dataset-fashion-mnist
    Path("data/FashionMNIST/raw"),  # torchvision, in the working directory
    Path(__file__).parent / "data/FashionMNIST/raw",
    Path.home() / "data/FashionMNIST/raw",
    Path.home() / ".cache/torchvision/FashionMNIST/raw",
)


def load(name: str) -> Split:
    """Return training inputs and labels, then test inputs and labels.

    Args:
        name: ``"digits"`` (1,797 images of 8x8 pixels, from scikit-learn, a fixed split) or
            ``"fashion-mnist"`` (60,000 and 10,000 images of 28x28 pixels).

    Returns:
        Inputs of shape (samples, 1, height, width), float32 in [0, 1]; labels of shape (samples,), int64.

    Raises:
        ValueError: If there is no data set of that name.
        FileNotFoundError: If Fashion-MNIST is neither here nor can be downloaded.
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist()
    raise ValueError(f'`name` must be "digits" or "fashion-mnist". Found `name = {name!r}`.')


def _digits() -> Split:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(array) for array in split)
    return _inputs(train_x, 16), train_y.long(), _inputs(test_x, 16), test_y.long()


def _fashion_mnist() -> Split:
    folder = _fashion_mnist_folder()
    train_x, train_y, test_x, test_y = (_read_idx(_file(folder, prefix)) for prefix in _PREFIXES)
    return _inputs(train_x, 255), train_y.long(), _inputs(test_x, 255), test_y.long()


def _inputs(images: Tensor, brightest: int) -> Tensor:
    return images.float().div_(brightest).unsqueeze(1)


def _fashion_mnist_folder() -> Path:
    given = os.environ.get("FASHION_MNIST_DIR")
    for folder in (Path(given),) if given else _FOLDERS:
        if all(_file(folder, prefix) for prefix in _PREFIXES):
            return folder
    if given:
        raise FileNotFoundError(
            f"`FASHION_MNIST_DIR` must name the folder of the four idx files. Found `{given}`, without "
            f"`{_PREFIXES[0]}-ubyte.gz` or one of its fellows. Correct it, or unset it to search elsewhere."
        )
    return _download()


def _download() -> Path:
    try:
        from torchvision.datasets import FashionMNIST

        return Path(FashionMNIST("data", download=True).raw_folder)
    except (ImportError, OSError, RuntimeError) as error:
        searched = ", ".join(str(folder) for folder in _FOLDERS)
        raise FileNotFoundError(
            f"Fashion-MNIST must be on this machine. Found none in {searched}, and no download: {error}. "
            "Install torchvision to download it, install Debian's package `dataset-fashion-mnist`, or set "
            "`FASHION_MNIST_DIR` to the folder of its four idx files."
        ) from error


def _file(folder: Path, prefix: str) -> Path | None:
    """Return the file, compressed or not; torchvision and Debian name them alike."""
    candidates = (folder / f"{prefix}-ubyte", folder / f"{prefix}-ubyte.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read_idx(path: Path) -> Tensor:
    """Read bytes in the idx format: a magic number that ends in the number of dimensions, sizes, data."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
