"""A trained model as MLflow loads it; `mlflow_store` logs it.

Logged models name this module, so it keeps its name. MLflow calls `_load_pyfunc` with the folder of
a logged model, and `predict` with what the model's signature has checked. Neither needs mlflow.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from i3dist.inference.language_model import LanguageModel, load


class TextContinuation:
    """Continues texts, for `mlflow.pyfunc.load_model` and `mlflow models serve`."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def predict(self, texts: ArrayLike, params: Mapping[str, Any] | None = None) -> list[str]:
        """Continue texts, side by side; returns the new text of each.

        Args:
            texts: one text, or several in a list, an array, or a column of a table.
            params: options of `LanguageModel.stream`, by name; `default_params` has all.

        Raises:
            UserError: an option is out of range.
        """
        prompts = np.asarray(texts, dtype=object).ravel().tolist()
        return self.model.generate(prompts, **(params or {}))


def default_params() -> dict[str, int | float | bool]:
    """Each option that `predict` takes, with its default."""
    options = inspect.signature(LanguageModel.stream).parameters.values()
    return {o.name: o.default for o in options if o.kind is o.KEYWORD_ONLY}


def _load_pyfunc(folder: str, model_config: Mapping[str, str] | None = None) -> TextContinuation:
    """Load a logged model; `model_config` may give `device` and `dtype` as `i3dist.load` does."""
    return TextContinuation(load(folder, **(model_config or {})))
