"""Image classification for the recipes: nets by name, a classifier, data modules without worker processes."""

from lightning_hrnn.vision.classifier import ImageClassifier
from lightning_hrnn.vision.data import DataNotFoundError, ImageData
from lightning_hrnn.vision.datasets import CIFAR10Data, DigitsData, FashionMNISTData, MNISTData
from lightning_hrnn.vision.models import MODELS, build_model

__all__ = [
    "MODELS",
    "CIFAR10Data",
    "DataNotFoundError",
    "DigitsData",
    "FashionMNISTData",
    "ImageClassifier",
    "ImageData",
    "MNISTData",
    "build_model",
]
