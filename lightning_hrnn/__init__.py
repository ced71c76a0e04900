"""A learned optimizer for people who train networks with Lightning."""

__version__ = "0.1.0"
