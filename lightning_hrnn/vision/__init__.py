"""Image classification for the recipes: nets by name, a classifier, data modules, pictures of what it predicts."""

from lightning_hrnn.vision.classifier import ImageClassifier
from lightning_hrnn.vision.data import DataNotFoundError, ImageData
from lightning_hrnn.vision.datasets import CIFAR10Data, CIFAR100Data, DigitsData, FashionMNISTData, MNISTData
from lightning_hrnn.vision.generated import write_image_folder
from lightning_hrnn.vision.imagenet import ImageNetData
from lightning_hrnn.vision.models import MODELS, build_model
from lightning_hrnn.vision.pictures import LogPredictions

__all__ = [
    "MODELS",
    "CIFAR10Data",
    "CIFAR100Data",
    "DataNotFoundError",
    "DigitsData",
    "FashionMNISTData",
    "ImageClassifier",
    "ImageData",
    "ImageNetData",
    "LogPredictions",
    "MNISTData",
    "build_model",
    "write_image_folder",
]
