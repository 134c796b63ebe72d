"""What a reduced model learns from the whole one (DynamicViT, arXiv:2106.02034, eq. 9 and 10), whatever reduces it."""

import torch.nn.functional as F
from torch import Tensor

from mim.reduction.tokens import Tokens


def distillation_loss(logits: Tensor, tokens: Tokens, teacher_logits: Tensor, teacher_tokens: Tensor) -> Tensor:
    """Agreement with the whole model: of the answers, and of the features of patches that are left.

    Args:
        logits: ``(B, classes)`` of the reduced model.
        tokens: of the reduced model in training, after the final norm.
        teacher_logits: ``(B, classes)`` of the whole model.
        teacher_tokens: ``(B, P + N, D)`` of the whole model, after the final norm.

    Returns:
        Half the Kullback-Leibler divergence of the answers plus half the mean squared error of the features.
    """
    answers = F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)
    error = (tokens.dense() - teacher_tokens[:, tokens.num_prefix :]).square().mean(dim=2)  # (B, N)
    left = (~tokens.gone).to(error.dtype)
    return 0.5 * answers + 0.5 * (left * error).sum() / left.sum().clamp(min=1)
