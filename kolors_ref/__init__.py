"""Kolors, the bilingual text-to-image model, in plain PyTorch."""

from typing import Any

__all__ = ["KolorsPipeline", "Request", "TextEmbeddings"]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, so that the command line can answer before torch is loaded."""
    if name == "KolorsPipeline":
        from .pipeline import KolorsPipeline as found
    elif name == "Request":
        from .request import Request as found
    elif name == "TextEmbeddings":
        from .text_layout import TextEmbeddings as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
