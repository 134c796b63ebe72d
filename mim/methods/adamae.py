"""AdaMAE: adaptive masking for video with masked autoencoders (arXiv:2211.09120, 2022).

A small network looks at all patches and says how likely each is to stay visible; the masked autoencoder sees a draw
from that, and what it fails to reconstruct becomes more likely. The paper is about video; for images nothing is
published.

Deviations:
    The sampler's loss is the published one, which is no unbiased policy gradient: it rewards patches that were hidden,
    with the probability of a single draw although many are drawn without replacement.
    The sampler does not move the patch embedding unless ``detach_input`` is false, as it is in the released code, and
    it has no dropout, which would depend on how a batch is cut into processes.
    Pixels are standardised over the channels of a patch together, as in MAE; only hidden patches are predicted.
"""

import math
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.layers.decoder import Decoder, decoder_shape
from mim.layers.initialisation import initialise
from mim.masking import SampledMasking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, NotNegative
from mim.patches import measured_patches, visible_indices
from mim.randomness import RowGenerator
from mim.targets import PixelTarget, Target


@dataclass(frozen=True)
class SamplerConfig:
    """How visible patches are learnt.

    Args:
        weight: of the sampler's loss; 1e-4 in the paper.
        heads: attention heads of its block; 8 in the paper.
        detach_input: its loss leaves the patch embedding alone; false in the released code.
    """

    weight: NotNegative = 1e-4
    heads: Count = 8
    detach_input: bool = True


class AdaMAE(Method):
    """Masked autoencoder that learns what to see.

    Args:
        encoder: the ViT to train; as for MAE, with ``positions: sincos``.
        masking: how many patches are hidden; the sampler says which.
        target: what is predicted for hidden patches; pixels standardised within their patch if not given.
        sampler: how visible patches are learnt.
        decoder_width: width of the decoder; two thirds of the encoder's (512 at most) if null.
        decoder_depth: blocks of the decoder; MAE's 8 by default, 4 of width 384 in the paper.
        decoder_heads: attention heads of the decoder; one per 32 of its width if null.
        optim: learning rate, weight decay and warm-up.
    """

    masking: SampledMasking

    def __init__(
        self,
        encoder: Encoder,
        masking: SampledMasking,
        target: Target | None = None,
        sampler: SamplerConfig = SamplerConfig(),
        decoder_width: Count | None = 512,
        decoder_depth: Count = 8,
        decoder_heads: Count | None = 16,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.visible_count = self.fixed_visible_count(guides=True)
        self.settings = sampler
        self.target = target or PixelTarget(standardise=True)
        self.sampler = PatchSampler(encoder.dim, encoder.grid, sampler.heads)
        self.decoder = Decoder(
            encoder.dim,
            encoder.grid,
            encoder.num_prefix,
            out_dim=self.target.dim(encoder),
            **decoder_shape(encoder.dim, decoder_width, decoder_depth, decoder_heads),
        )
        for part in (self.sampler, self.decoder):
            initialise(part)
        nn.init.normal_(self.sampler.score.weight, std=0.02)  # almost equal chances at first
        if not encoder.pretrained:
            initialise(encoder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Error of hidden patches, and a small reward for the sampler where it was large."""
        images, valid = single_view(batch)
        log_share = self.sample(images)  # (B, N)
        mask = self.draw(log_share, self.row_generator(len(images), batch_idx), valid)  # (B, N)
        prediction, hidden = self.reconstruct(images, mask)
        target, weights = self.target.measured(images, self.encoder.grid, hidden, valid)
        error = self.target.errors(prediction, target, weights)  # (B, M)
        reconstruction, chosen = self.target.mean_error(error, weights), log_share.gather(1, hidden)
        sampling = sampling_loss(chosen, error.detach())
        loss = reconstruction + self.settings.weight * sampling
        self.log_dict({"train/loss": loss, "train/reconstruction": reconstruction, "train/sampling": sampling})
        self.log_dict(health(log_share.detach(), chosen.detach(), error.detach()))
        return self.anchored(loss, images)

    def sample(self, images: Tensor) -> Tensor:
        """Logarithms of the probabilities that patches are the next to be seen, ``(B, N)`` float32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.detach_input):
            patches = self.encoder.embed(images)  # (B, N, D)
        log_share: Tensor = self.sampler(patches).float().log_softmax(dim=1)
        self.skip_step_unless_finite(log_share)  # the loss would not tell: masks are drawn from any scores
        return log_share

    def draw(self, log_share: Tensor, generator: RowGenerator, valid: Tensor | None = None) -> Tensor:
        """Masks ``(B, N)`` by the sampler's ``log_share (B, N)``.

        What ``valid (B, 1, H, W)`` says was not measured is seen last: the few visible patches are to show something.
        """
        scores = -log_share
        if valid is not None:
            scores = scores.masked_fill(~measured_patches(valid, self.encoder.patch_size), torch.inf)
        return self.draw_mask(generator, scores)

    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for the hidden patches, ``(B, M, dim)``, and their places, ``(B, M)``."""
        latent = self.encoder(images, mask, visible_count=self.visible_count)  # (B, P + K, D)
        hidden = visible_indices(~mask, mask.shape[1] - self.visible_count)  # (B, M)
        return self.decoder(latent, mask, hidden), hidden

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What the sampler leaves visible, the reconstruction, and the probabilities as a map.

        The draw depends on the row alone, so pictures of one batch compare over training.
        """
        log_share = self.sample(images)
        mask = self.draw(log_share, RowGenerator.for_rows(0, 0, len(images), images.device))
        prediction, hidden = self.reconstruct(images, mask)
        pictures = self.target.pictures(prediction, images, self.encoder.grid, hidden)
        return pictures | {"probability": log_share.exp().view(-1, *self.encoder.grid)}


class PatchSampler(nn.Module):
    """One block that looks at all patches, and a score for each.

    Args:
        dim: width ``D`` of a patch token.
        grid: ``(h, w)`` patches per side.
        heads: attention heads.
    """

    def __init__(self, dim: int, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"a sampler of width {dim} cannot have {heads} heads; set sampler.heads")
        self.positions = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
        self.block = Block(dim, heads, qkv_bias=True)
        self.score = nn.Linear(dim, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, N)``."""
        scores: Tensor = self.score(self.block(patches + self.positions))[..., 0]
        return scores


def sampling_loss(log_share: Tensor, error: Tensor) -> Tensor:
    """Minus the mean of log-probability times error over hidden patches; ``(B, M)`` both, errors without gradient."""
    return -(log_share * error).mean()


def health(log_share: Tensor, chosen: Tensor, error: Tensor) -> dict[str, Tensor]:
    """How far the sampler is from chance, and whether it knows what is hard.

    Args:
        log_share: ``(B, N)`` logarithms of probabilities.
        chosen: ``(B, M)``, those of hidden patches.
        error: ``(B, M)`` of hidden patches.

    Returns:
        Entropy over its largest value, 1 for equal chances, 0 for certainty; and the mean over images of the
        correlation between probability and error.
    """
    entropy = -(log_share.exp() * log_share).sum(dim=1).mean() / math.log(log_share.shape[1])
    both = torch.stack([chosen.exp(), error])  # (2, B, M)
    both = both - both.mean(dim=2, keepdim=True)
    correlation = (both[0] * both[1]).sum(dim=1) / (both.norm(dim=2).prod(dim=0)).clamp(min=1e-12)
    return {"health/sampler_entropy": entropy, "health/error_correlation": correlation.mean()}
