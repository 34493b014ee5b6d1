"""Token losses from hidden states. Letters: T tokens, D width, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not trained on


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, fp32 (fp64 of fp64); 0 where the target is `IGNORE`.

    Args:
        hidden: [..., D].
        head: [V, D] output projection.
        targets: [...] int64.
    """
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape)
