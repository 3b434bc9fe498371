"""The studio: teach a generative model a subject, a style, a motion or a tradition, and take home a small file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.api import attach, export, generate, load_base, merge, train

__version__ = "0.1.0"
__all__ = ["__version__", "attach", "export", "generate", "load_base", "merge", "train"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `studio --help` must not wait for torch.
    if name in __all__:
        from studio import api

        return getattr(api, name)
    raise AttributeError(f"module 'studio' has no attribute '{name}'")
