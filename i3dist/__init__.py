"""i3dist: distributed training of language models whose past is compressed.

    import i3dist
    model = i3dist.load("runs/mine")      # docs/using.md

What is imported from here is loaded when it is first used: `import i3dist` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from i3dist.errors import UserError
    from i3dist.inference.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "UserError", "__version__", "load"]

_MODULES = {
    "LanguageModel": "i3dist.inference.language_model",
    "UserError": "i3dist.errors",
    "load": "i3dist.inference.language_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
