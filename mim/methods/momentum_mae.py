"""MAE whose masks follow the attention of a momentum teacher: AttMask's idea (arXiv:2203.12719) without its losses.

Neither paper describes it. The student is trained as in MAE; the teacher is its moving average, looks at the whole
image, and costs as much as encoding it. Its attention means little at first, so the first masks are as good as random.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from mim.encoder import Encoder
from mim.layers.teacher import Teacher
from mim.masking import Masking
from mim.methods.base import hidden_last
from mim.methods.mae import MAE
from mim.options.ranges import Share
from mim.randomness import RowGenerator
from mim.schedules import cosine


class MomentumMAE(MAE):
    """Masked autoencoder with attention-guided masks.

    Args:
        encoder: the ViT to train, with a class token.
        masking: ``AttentionMasking`` that hides by one ratio, ``low`` equal to ``high`` and ``unmasked_share: 0``, or
            ``AttentionKeepMasking``.
        momentum: share of the teacher that a step keeps, at the first step; it rises to 1 along half a cosine.
        mae: what else :class:`MAE` takes.
    """

    guides: ClassVar[bool] = True
    name = "momentum_mae"

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        momentum: Share = 0.996,
        **mae: Any,  # noqa: ANN401 - checked by MAE
    ) -> None:
        super().__init__(encoder, masking, **mae)
        if not encoder.has_class_token:
            raise ValueError("masks follow the attention of the class token, and this encoder has none")
        if not encoder.has_class_attention:
            raise ValueError("masks follow the attention of the class token, which this encoder does not show")
        self.first_momentum = momentum
        self.teacher = Teacher(encoder)

    @torch.no_grad()
    def draw(self, images: Tensor, generator: RowGenerator, valid: Tensor | None = None) -> Tensor:
        """Masks ``(B, N)`` by the teacher's attention to the whole image; patches without measurement come last."""
        _, scores = self.teacher.module.forward_with_attention(images)
        self.skip_step_unless_finite(scores)  # the loss would not tell: masks are drawn from any scores
        return self.draw_mask(generator, hidden_last(scores, valid, self.encoder))

    def after_optimizer_step(self, step: int) -> None:
        """Moves the teacher towards the student."""
        super().after_optimizer_step(step)
        momentum = cosine(step / self.plan.max_steps, self.first_momentum, 1.0)
        self.teacher.update(momentum, unless=self.step_was_skipped)
