"""The data sets of the small recipes: digits, Fashion-MNIST, MNIST, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_hrnn.vision.batches import ImageSet
from lightning_hrnn.vision.data import DataNotFoundError, ImageData, stratified_split
from lightning_hrnn.vision.idx import find_idx, read_idx
from lightning_hrnn.vision.transforms import Scale, ShiftAndFlip

IDX_PARTS = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def fetch(name: str, folder: str | Path, how: str) -> None:
    """Let torchvision download a data set.

    Args:
        name: The data set's class in `torchvision.datasets`.
        folder: Where to.
        how: How else to obtain it, for the error.

    Raises:
        DataNotFoundError: If it cannot be downloaded.
    """
    from torchvision import datasets

    try:
        getattr(datasets, name)(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise DataNotFoundError(f"{name} could not be downloaded: {error}. {how}") from error


class DigitsData(ImageData):
    """The 1,797 real 8x8 images of handwritten digits that come with scikit-learn; nothing to download.

    Split by a fixed stratified draw into 1,437 training images (`validation` of them set aside) and 360 test
    images.

    Args:
        batch_size: Training images per step and process.
        eval_batch_size: Images per step and process when only scoring.
        validation: Number of training images set aside for validation, stratified by class.
        image_size: Side in pixels to resize images to; None keeps 8.
        seed: Seed of the order of the training batches.

    Example:
        >>> data = DigitsData(batch_size=32)
        >>> len(data.images("train")), len(data.images("val")), len(data.images("test"))
        (1257, 180, 360)
    """

    scale = Scale(mean=(0.3065,), std=(0.3772,), maximum=16.0)

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        validation: int = 180,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation, image_size, seed)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the training and the test images."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)  # [1797, 1, 8, 8]
        data = ImageSet(images, torch.from_numpy(digits.target).long())
        training, test = stratified_split(data.labels, held_out=360)
        return data.subset(training), data.subset(test)


class IdxImageData(ImageData):
    """A data set published as four gzipped idx files.

    The files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`,
    `t10k-labels-idx1-ubyte`, with or without `.gz`, are looked for in `data_dir` itself and in
    `data_dir/NAME/raw`, where torchvision puts them.

    Args:
        data_dir: Folder of the data; None looks in `data`, and where Debian's package, if there is one, puts them.
        batch_size: Training images per step and process.
        eval_batch_size: Images per step and process when only scoring.
        validation: Number of training images set aside for validation, stratified by class.
        image_size: Side in pixels to resize images to; None keeps 28.
        seed: Seed of the order of the training batches.
        download: Let torchvision download the files into `data_dir` (or `data`), if they are not found.
    """

    name: str
    obtain: str
    debian: Path | None = None  # where Debian's package puts the files, if there is one

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        validation: int = 5000,
        image_size: int | None = None,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation, image_size, seed)
        self.data_dir = data_dir
        self.download = download

    def prepare_data(self) -> None:
        """Download the files, if asked to and if they are not there; in one process of a machine."""
        if self.download and self._files() is None:
            fetch(self.name, self.folders()[0], self._not_found())

    def folders(self) -> list[Path]:
        """Return where the files are looked for, in order."""
        folder = Path("data" if self.data_dir is None else self.data_dir)
        elsewhere = [self.debian] if self.data_dir is None and self.debian else []
        return [folder, folder / self.name / "raw", *elsewhere]

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the training and the test images.

        Raises:
            DataNotFoundError: If no folder holds all four files.
        """
        files = self._files()
        if files is None:
            raise DataNotFoundError(self._not_found())
        tensors = [read_idx(path) for path in files]
        return (
            ImageSet(tensors[0].unsqueeze(1), tensors[1].long()),
            ImageSet(tensors[2].unsqueeze(1), tensors[3].long()),
        )

    def _files(self) -> list[Path] | None:
        """Return the four files of the first folder that holds all of them."""
        for folder in self.folders():
            found = [path for part in IDX_PARTS if (path := find_idx(folder, part)) is not None]
            if len(found) == len(IDX_PARTS):
                return found
        return None

    def _not_found(self) -> str:
        looked = " nor ".join(f"{str(folder)!r}" for folder in self.folders())
        return (
            f"{self.name} not found: neither {looked} holds the four files "
            f"{', '.join(f'{part}.gz' for part in IDX_PARTS)}. {self.obtain} "
            "Name their folder with --data.data_dir (demo, evaluate: --data-dir); train also downloads them, with "
            "--data.download true."
        )


class FashionMNISTData(IdxImageData):
    """Fashion-MNIST: 70,000 images, 28x28, of ten kinds of clothing.

    Without a `data_dir`, the folder of Debian's package dataset-fashion-mnist is looked at too.
    """

    name = "FashionMNIST"
    obtain = (
        "Install them with `apt-get install dataset-fashion-mnist` (Debian, Ubuntu; found if no folder is named), "
        "or download them from https://github.com/zalandoresearch/fashion-mnist, or let torchvision: "
        "`python -c \"import torchvision; torchvision.datasets.FashionMNIST('data', download=True)\"`."
    )
    debian = Path("/usr/share/datasets/fashion-mnist")
    scale = Scale(mean=(0.2860,), std=(0.3530,))


class MNISTData(IdxImageData):
    """MNIST: 70,000 images, 28x28, of handwritten digits."""

    name = "MNIST"
    obtain = (
        "Download them with torchvision: "
        "`python -c \"import torchvision; torchvision.datasets.MNIST('data', download=True)\"`."
    )
    scale = Scale(mean=(0.1307,), std=(0.3081,))


class CIFAR10Data(ImageData):
    """CIFAR-10: 60,000 colour images, 32x32, of ten kinds of things, as torchvision stores them.

    Training images are moved by up to `shift` pixels and half of them mirrored.

    Args:
        data_dir: Folder that holds `cifar-10-batches-py` (CIFAR-100: `cifar-100-python`).
        batch_size: Training images per step and process.
        eval_batch_size: Images per step and process when only scoring.
        validation: Number of training images set aside for validation, stratified by class.
        image_size: Side in pixels to resize images to; None keeps 32.
        shift: Largest random move in pixels; None leaves training images as they are.
        seed: Seed of the order of the training batches.
        download: Let torchvision download the images into `data_dir`, if they are not there.
    """

    name = "CIFAR10"
    scale = Scale(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        validation: int = 5000,
        image_size: int | None = None,
        shift: int | None = 4,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation, image_size, seed)
        self.data_dir = data_dir
        self.shift = shift
        self.download = download

    def prepare_data(self) -> None:
        """Download the images, if asked to and if they are not there; in one process of a machine."""
        if self.download:
            fetch(self.name, self.data_dir, self._not_found())

    def train_transform(self) -> Scale | ShiftAndFlip:
        """Return what turns stored images into inputs while training."""
        scale = self.eval_transform()
        return scale if self.shift is None else ShiftAndFlip(scale, self.shift)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the training and the test images.

        Raises:
            DataNotFoundError: If `data_dir` does not hold the data set.
        """
        from torchvision import datasets

        try:
            parts = [getattr(datasets, self.name)(self.data_dir, train=train) for train in (True, False)]
        except RuntimeError as error:
            raise DataNotFoundError(self._not_found()) from error
        training, test = (
            ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
            for part in parts
        )
        return training, test

    def _not_found(self) -> str:
        from torchvision import datasets

        base = getattr(datasets, self.name).base_folder
        command = f"import torchvision; torchvision.datasets.{self.name}({self.data_dir!r}, download=True)"
        return (
            f"{self.name} not found in {self.data_dir!r}, which should hold the folder {base}. "
            f'Download it with --data.download true, or with `python -c "{command}"`. '
            "Name its folder with --data.data_dir."
        )


class CIFAR100Data(CIFAR10Data):
    """CIFAR-100: 60,000 colour images, 32x32, of a hundred kinds of things; otherwise like `CIFAR10Data`."""

    name = "CIFAR100"
    scale = Scale(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
