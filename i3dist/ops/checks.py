"""What operators require of their inputs. Each error is a `ValueError` of one line."""

import torch
from torch import Tensor


def check_shapes(operator: str, wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Check the shape of each input by name; None is an input that is not given.

    Raises:
        ValueError: one has another shape.
    """
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{operator}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def check_dtypes(operator: str, alike: dict[str, Tensor | None], restart: Tensor) -> None:
    """Check that inputs share the first's dtype, and that `restart` is bool; shapes may be any.

    Raises:
        ValueError: one has another dtype. None is an input that is not given.
    """
    (first, like), *others = alike.items()
    assert like is not None
    for name, tensor in others:
        if tensor is not None and tensor.dtype != like.dtype:
            raise ValueError(
                f"{operator}: {first} and {name} must share a dtype, got {like.dtype} and "
                f"{tensor.dtype}"
            )
    if restart.dtype != torch.bool:
        raise ValueError(f"{operator}: restart must be bool, got {restart.dtype}")


def is_plain() -> bool:
    """Whether a call is neither compiled nor differentiated, and so needs no operator of PyTorch's
    around it."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()
