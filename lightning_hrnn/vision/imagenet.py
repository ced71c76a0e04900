"""ImageNet, or any folder of images arranged like it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_hrnn.vision.data import DataNotFoundError, batches_done, data_rank
from lightning_hrnn.vision.loading import EpochShare, ResumableLoader
from lightning_hrnn.vision.transforms import brightness

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVAL_SHARE = 0.875
"""Of the shorter side of an image, in the crop that is scored: 224 of 256 pixels, 299 of 342."""
ARCHIVES = {
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}
ARRANGE = (
    "ImageNet is free for research: register at https://image-net.org, agree to its terms and download "
    f"{ARCHIVES['train']} (138 GB), {ARCHIVES['val']} (6 GB) and {ARCHIVES['devkit']}. Put the three into the folder: "
    "they are unpacked on first use (needs as much space again). Or arrange the images as train/CLASS/*.JPEG and "
    "val/CLASS/*.JPEG; a val/ with all images side by side needs the devkit's archive beside it. "
    "Name the folder with --data.data_dir. To try the pipeline without ImageNet: "
    "`python -c \"import lightning_hrnn.vision as v; v.write_image_folder('data/generated')\"`."
)


class ImageNetData(LightningDataModule):
    """Serve ImageNet's 1.28 million training and 50,000 validation images, or any folder arranged like it.

    `DATA_DIR/train/CLASS/*` and `DATA_DIR/val/CLASS/*`; or ImageNet's three archives, which are unpacked on
    first use; or a `val/` with all images side by side, whose classes the devkit's archive names.

    Training images are cropped at random (8 to 100 % of the area, sides 3:4 to 4:3), resized and half of them
    mirrored; scored ones are resized and cropped in the middle. The order of an epoch depends on `seed` and
    its number alone, so a run that was stopped within an epoch goes on with the images that it has not seen;
    crops are drawn anew. Validation images serve as test images too, for ImageNet's own have no public labels.

    Args:
        data_dir: The folder.
        batch_size: Training images per step and process.
        eval_batch_size: Images per step and process when only scoring.
        image_size: Side of the network's input in pixels: 224 for ResNets, 299 for Inception V3.
        smallest_crop: Smallest area of a training crop, as a share of the image's.
        workers: Processes that load images, for each training process; 0 loads in the training process.
        pin_memory: Whether to load into memory from which a GPU can fetch while it computes; None does so
            where there is a GPU.
        persistent_workers: Whether to keep the workers between epochs.
        seed: Seed of the order of the training batches.

    Raises:
        DataNotFoundError: In `setup`, if the folder holds nothing of the kind; says how to obtain the images
            and how to arrange them.
    """

    def __init__(
        self,
        data_dir: str = "data/imagenet",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        image_size: int = 224,
        smallest_crop: float = 0.08,
        workers: int = 8,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.image_size = image_size
        self.smallest_crop = smallest_crop
        self.workers = workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.seed = seed
        self.classes: list[str] = []
        self._train: Dataset[Any] | None = None
        self._val: Dataset[Any] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, known after `setup`."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Unpack ImageNet's archives, if they are there and not unpacked yet; in one process of a machine."""
        from torchvision.datasets import imagenet

        folder = Path(self.data_dir)
        if (folder / ARCHIVES["devkit"]).is_file() and not (folder / imagenet.META_FILE).is_file():
            imagenet.parse_devkit_archive(folder)
        for part in ("train", "val"):
            if (folder / ARCHIVES[part]).is_file() and not (folder / part).exists():
                imagenet.ImageNet(folder, split=part)

    def setup(self, stage: str | None = None) -> None:
        """List the images, once."""
        if self._train is not None:
            return
        from torchvision.datasets import ImageFolder

        train, val = Path(self.data_dir, "train"), Path(self.data_dir, "val")
        for part in (train, val):
            if not part.is_dir():
                raise DataNotFoundError(f"{str(self.data_dir)!r} holds no folder {part.name!r}. {ARRANGE}")
        try:
            training = ImageFolder(train, transform=self.train_transform())
            if any(entry.is_dir() for entry in val.iterdir()):
                scored: Any = ImageFolder(val, transform=self.eval_transform())
            else:
                scored = self._flat(val, training.class_to_idx)
        except FileNotFoundError as error:  # no class, or one without an image; no devkit
            raise DataNotFoundError(f"{str(error).rstrip('.')}. {ARRANGE}") from error
        if strange := sorted(set(getattr(scored, "classes", training.classes)) ^ set(training.classes)):
            raise ValueError(f"{train} and {val} differ in their classes, for example in {strange[0]!r}.")
        self.classes, self._train, self._val = training.classes, training, scored

    def train_dataloader(self) -> ResumableLoader:
        """Return this process's training batches, in another order each epoch; the ragged last one is left out."""
        position = partial(batches_done, self)
        rank, world_size = data_rank(self)
        assert self._train is not None
        sampler = EpochShare(self._train, self.batch_size, rank, world_size, self.seed, position)
        return ResumableLoader(
            self._train,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            position=position,
            **self._loading(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches; Lightning deals them out to the processes."""
        assert self._val is not None
        return DataLoader(self._val, batch_size=self.eval_batch_size, **self._loading())

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches."""
        return self.val_dataloader()

    def train_transform(self) -> Any:
        """Return what turns a training image into the network's input [3, image_size, image_size]."""
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(self.image_size, scale=(self.smallest_crop, 1.0), antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), *self._to_tensor()])

    def eval_transform(self) -> Any:
        """Return what turns an image into the network's input when it is scored."""
        from torchvision.transforms import v2

        resize = v2.Resize(round(self.image_size / EVAL_SHARE), antialias=True)
        return v2.Compose([resize, v2.CenterCrop(self.image_size), *self._to_tensor()])

    def picture(self, images: Tensor) -> Tensor:
        """Turn inputs [B, 3, H, W] back into shares of brightness, for people to look at."""
        return brightness(images, MEAN, STD)

    def _to_tensor(self) -> list[Any]:
        import torch
        from torchvision.transforms import v2

        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]

    def _loading(self) -> dict[str, Any]:
        from lightning.pytorch.accelerators import CUDAAccelerator

        on_gpu = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        return {
            "num_workers": self.workers,
            "pin_memory": on_gpu if self.pin_memory is None else self.pin_memory,
            "persistent_workers": self.persistent_workers and self.workers > 0,
        }

    def _flat(self, val: Path, class_to_index: dict[str, int]) -> Dataset[Any]:
        """List a flat validation folder: its images in order of their names, their classes from the devkit."""
        from torchvision.datasets import imagenet
        from torchvision.datasets.folder import IMG_EXTENSIONS

        if not Path(self.data_dir, imagenet.META_FILE).is_file():
            raise FileNotFoundError(
                f"{str(val)!r} holds no folder for each class, and {ARCHIVES['devkit']}, which would say what its "
                f"images show, is not in {str(self.data_dir)!r}"
            )
        _, names = imagenet.load_meta_file(self.data_dir)
        files = sorted(path for path in val.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        if len(files) != len(names):
            raise ValueError(f"{val} holds {len(files)} images, the devkit names the classes of {len(names)}.")
        if missing := sorted(set(names) - set(class_to_index)):
            raise ValueError(f"{val} has images of the class {missing[0]!r}, which the training images lack.")
        samples = [(str(path), class_to_index[name]) for path, name in zip(files, names, strict=True)]
        return ListedImages(samples, self.eval_transform())


class ListedImages(Dataset[tuple[Any, int]]):
    """Images by path, with their classes.

    Args:
        samples: Path and class of each image.
        transform: Applied to each image.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: Any) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.datasets.folder import default_loader

        path, label = self.samples[index]
        return self.transform(default_loader(path)), label
