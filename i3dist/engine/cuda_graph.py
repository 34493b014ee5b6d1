"""Forward and backward of one micro-batch, recorded as CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def capture(
    call: Callable[..., Any], parameters: Sequence[Tensor], arguments: Sequence[Any]
) -> Callable[..., Any]:
    """Record forward and backward of `call(*parameters, *arguments)`; returns what replays them.

    Launching the kernels one by one takes the host longer than they take the GPU. The recording
    holds everything from the parameters to the losses and back to the parameters' gradients;
    DeepSpeed's hooks, reduction and optimizer step stay outside.

    Args:
        call: returns (losses, lane state).
        parameters: what gradients are wanted of.
        arguments: of the shapes that all later calls must have. A later call overwrites what the
            one before it returned.
    """
    samples = tree_map(torch.clone, arguments)
    # Leaves of their own, in the same memory: hooks on the parameters' own autograd nodes are bound
    # to another stream.
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    losses, _ = call(*leaves, *samples)  # compiles before recording
    torch.autograd.grad(losses.sum(), leaves)
    del losses
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    return torch.cuda.make_graphed_callables(call, (*leaves, *samples))
