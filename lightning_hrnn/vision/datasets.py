"""The data sets that the recipes train on: digits, Fashion-MNIST, MNIST, CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_hrnn.vision.batches import ImageSet
from lightning_hrnn.vision.data import DataNotFoundError, ImageData, stratified_split
from lightning_hrnn.vision.idx import find_idx, read_idx
from lightning_hrnn.vision.transforms import Scale, ShiftAndFlip


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
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation, image_size, seed)
        self.data_dir = data_dir

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
        parts = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        for folder in self.folders():
            found = [find_idx(folder, part) for part in parts]
            if all(found):
                tensors = [read_idx(path) for path in found if path is not None]
                return (
                    ImageSet(tensors[0].unsqueeze(1), tensors[1].long()),
                    ImageSet(tensors[2].unsqueeze(1), tensors[3].long()),
                )
        looked = " nor ".join(f"{str(folder)!r}" for folder in self.folders())
        raise DataNotFoundError(
            f"{self.name} not found: neither {looked} holds the four files "
            f"{', '.join(f'{part}.gz' for part in parts)}. {self.obtain} "
            "Name their folder with --data.data_dir (demo: --data-dir)."
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
        data_dir: Folder that holds `cifar-10-batches-py`.
        batch_size: Training images per step and process.
        eval_batch_size: Images per step and process when only scoring.
        validation: Number of training images set aside for validation, stratified by class.
        image_size: Side in pixels to resize images to; None keeps 32.
        shift: Largest random move in pixels; None leaves training images as they are.
        seed: Seed of the order of the training batches.
    """

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
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation, image_size, seed)
        self.data_dir = data_dir
        self.shift = shift

    def train_transform(self) -> Scale | ShiftAndFlip:
        """Return what turns stored images into inputs while training."""
        scale = self.eval_transform()
        return scale if self.shift is None else ShiftAndFlip(scale, self.shift)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the training and the test images.

        Raises:
            DataNotFoundError: If `data_dir` does not hold the data set.
        """
        from torchvision.datasets import CIFAR10

        try:
            parts = [CIFAR10(self.data_dir, train=train) for train in (True, False)]
        except RuntimeError as error:
            command = f"import torchvision; torchvision.datasets.CIFAR10({self.data_dir!r}, download=True)"
            raise DataNotFoundError(
                f"CIFAR-10 not found in {self.data_dir!r}, which should hold the folder {CIFAR10.base_folder}. "
                f'Download it with `python -c "{command}"`. Name its folder with --data.data_dir.'
            ) from error
        training, test = (
            ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
            for part in parts
        )
        return training, test
