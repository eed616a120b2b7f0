"""multiway: one Multiway Transformer for images, text, audio and video, and the published systems around it.

The names users type are imported when they are first used, so that ``import multiway`` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiway.pretrained import Pretrained, create_model, encode, list_models, load, save_pretrained

__all__ = ["Pretrained", "create_model", "encode", "list_models", "load", "save_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'multiway' has no attribute {name!r}; it has {', '.join(__all__)}")
    from multiway import pretrained

    return getattr(pretrained, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
