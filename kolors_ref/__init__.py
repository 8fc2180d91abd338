"""Kolors, the bilingual text-to-image model, in plain PyTorch."""

from .pipeline import KolorsPipeline
from .text_layout import TextEmbeddings

__all__ = ["KolorsPipeline", "TextEmbeddings"]
