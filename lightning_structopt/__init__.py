"""Structural optimization for PyTorch Lightning: make a model smaller, faster or better."""

__version__ = "0.1.0.dev0"
