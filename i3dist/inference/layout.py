"""A model laid out for inference: its weights are padded once instead of in every call."""

import copy

import torch
from torch import Tensor, nn

from i3dist.model.layers import LayerNorm, Linear
from i3dist.model.lm import I3LM


@torch.no_grad()
def laid_out(model: I3LM) -> I3LM:
    """The same model with weights on computed channels, without gradients.

    `Channels.pad` leaves a padded tensor as it is, so every part of the model works on it as
    before. Weights that need no padding share memory with the model's.

    Args:
        model: stays as it is.
    """
    copies: dict[int, Tensor] = {id(part): part for part in model.buffers()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            copies[id(parameter)] = nn.Parameter(_padded(module, name, parameter), False)
    copied = copy.deepcopy(model, copies)  # takes from `copies` what is in it
    copied.compile_nothing()
    return copied.eval()


def _padded(module: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    if isinstance(module, Linear) and name == "weight":
        weight = module.computed(parameter.detach())
        # Padding of dim 0 leaves columns in a row of memory, where GPUs want rows.
        return weight.contiguous() if weight.is_cuda else weight
    if isinstance(module, LayerNorm):
        return module.channels.pad(parameter.detach())
    return parameter.detach()
