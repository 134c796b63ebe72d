"""SeiT++: masked token modelling on stored ids (arXiv:2312.10105, 2023), with the encoder and decoder of MAGE.

Images are a few bytes of ids each. Hide a part of them, leave out most of what is hidden, stand a mask token for the
rest, and let a light decoder tell the hidden ids. What it is asked with is the encoded class token, copied to every
hidden place, so that this token has to know the image.

Deviations:
    The network sees the pixels that each known id stands for, not a learned vector, so that what is exported is a ViT
    for images; the logits have a linear map of their own, where the paper multiplies with that vector.
    Blocks are timm's, without dropout.
"""

import math

import torch
from torch import Tensor, nn

from mim.distributed.devices import send
from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.decoder import Trunk
from mim.layers.initialisation import initialise
from mim.masking import TruncatedNormalMasking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, Share, ShareBelowOne
from mim.patches import gather_tokens, some_of, visible_indices
from mim.randomness import RowGenerator
from mim.targets import TokenTarget
from mim.tokenizers.colours import recoloured

_CODE = 32  # width of a code in the paper's tokenizer, from which the logits are made


class SeiT(Method):
    """Hidden ids from the class token and what is left.

    Args:
        encoder: the ViT to train; it needs a class token. Its patches are as large as the tokenizer's tokens, or whole
            multiples: 2 x 2 tokens in the paper.
        masking: how many patches are hidden; equally many of all images of a step.
        target: the tokenizer.
        drop: share of all patches that the encoder does not see at all; the other hidden ones are mask tokens to it.
        decoder_width: width of the decoder; 512 in the paper.
        decoder_depth: blocks of the decoder; 4 in the paper.
        decoder_heads: attention heads of the decoder; 16 in the paper.
        recolour: share of the images that get the colours of another one as ids (ColorAdapt); 0 in the released
            pretraining. The other is at the opposite place of the micro-batch.
        optim: learning rate, weight decay and warm-up.
    """

    masking: TruncatedNormalMasking

    def __init__(
        self,
        encoder: Encoder,
        masking: TruncatedNormalMasking | None = None,
        target: TokenTarget | None = None,
        drop: ShareBelowOne = 0.4,
        decoder_width: Count = 512,
        decoder_depth: Count = 4,
        decoder_heads: Count = 16,
        recolour: Share = 0.0,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking or TruncatedNormalMasking(), optim)
        self.target = target or TokenTarget()
        self.patches, self.drop, self.recolour = math.prod(encoder.grid), drop, recolour
        self.dropped_count = TruncatedNormalMasking.hidden_count(drop, self.patches)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.dim), std=0.02))
        sizes = {"width": decoder_width, "depth": decoder_depth, "heads": decoder_heads}
        self.tokens_per_patch = self.target.tokens_per_patch(encoder)
        self.decoder = ClassQueryDecoder(
            encoder.dim, self.patches, encoder.num_prefix, self.tokens_per_patch * _CODE, **sizes
        )
        self.logits = nn.Sequential(nn.GELU(), nn.LayerNorm(_CODE), nn.Linear(_CODE, self.target.tokenizer.codes))
        for part in (self.decoder, self.logits):
            initialise(part)

    def check(self) -> None:
        """Refuses ViTs without a class token, and more dropped than hidden."""
        super().check()
        if not self.encoder.has_class_token:
            raise UserError(
                "SeiT asks for hidden ids with the class token, which this model does not have",
                hint="--model vit_small_patch16_224   or   --method maskgit",
            )
        if self.drop > self.masking.low:
            raise UserError(
                f"drop {self.drop} is more than the smallest share that is hidden, {self.masking.low}",
                why="what is dropped is a part of what is hidden",
                hint=f"--model.init_args.drop {self.masking.low}   or   --mask_ratio {self.drop}",
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of hidden ids, mean over the tokens of a patch, then over hidden patches."""
        images, valid = single_view(batch)
        generator = self.row_generator(len(images), batch_idx, "cpu")
        mask, dropped, hidden = self.draw(generator)
        whole = self.recoloured(self.known_ids(self.target.ids(images)), generator)  # (B, h', w')
        ids = self.target.by_patch(whole, self.encoder.grid)  # (B, N, s)
        prediction = self.predict(ids, mask, dropped, hidden)
        weights = self.target.weights(valid, images, self.encoder.grid, hidden)
        loss = self.target.loss(prediction, gather_tokens(ids, hidden), weights)
        self.log("train/loss", loss)
        return self.anchored(loss, images)

    @torch.no_grad()
    def recoloured(self, ids: Tensor, generator: RowGenerator) -> Tensor:
        """``ids (B, h', w')``, some of them in the colours of the image at the opposite place: ColorAdapt."""
        rows = (generator.rand() < self.recolour).nonzero()[:, 0] if self.recolour else torch.empty(0)
        if not len(rows):  # known without waiting, as the generator is on the CPU
            return ids
        codebook, rows = self.target.tokenizer.codebook, send(rows, ids.device)
        changed = codebook.nearest(recoloured(codebook(ids[rows]), codebook(ids[len(ids) - 1 - rows])))
        return ids.index_copy(0, rows, changed)

    def draw(self, generator: RowGenerator) -> tuple[Tensor, Tensor, Tensor]:
        """What is hidden and what is dropped of it, ``(B, N)`` bool each, and hidden places ``(B, M)`` in order.

        Drawn on the CPU, where counting how many that are is free.
        """
        mask = self.draw_mask(generator)
        hidden = visible_indices(~mask)
        left_out = some_of(hidden, self.dropped_count, generator.rand(hidden.shape[1]))
        dropped = torch.zeros_like(mask).scatter(1, left_out, True)
        mask, dropped, hidden = (send(part, self.mask_token.device) for part in (mask, dropped, hidden))
        return mask, dropped, hidden

    def predict(self, ids: Tensor, mask: Tensor, dropped: Tensor, hidden: Tensor) -> Tensor:
        """Logits ``(B, M, s * V)`` of the tokens on patches ``hidden (B, M)``.

        Args:
            ids: ``(B, N, s)``; those of hidden patches may be anything.
            mask: ``(B, N)``, True = hidden.
            dropped: ``(B, N)``, True = hidden and not seen by the encoder either.
            hidden: where ``mask`` is True.
        """
        seen = self.mosaic(ids.masked_fill(mask[..., None], 0)).to(self.mask_token.dtype)
        kept = self.patches - self.dropped_count
        latent = self.encoder(seen, mask, self.mask_token, visible_count=kept, dropped=dropped)  # (B, P + K, D)
        codes = self.decoder(latent, mask, visible_indices(dropped, kept), hidden)  # (B, M, s * 32)
        logits: Tensor = self.logits(codes.unflatten(2, (self.tokens_per_patch, _CODE)))  # (B, M, s, V)
        return logits.flatten(2)

    def mosaic(self, ids: Tensor) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` of ``ids (B, N, s)``, each token by itself."""
        height, width = (side // self.target.tokenizer.stride for side in self.encoder.patch_size)
        return self.target.mosaic(self.target.by_place(ids, self.encoder.grid, (height, width)))

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What the tokens show of ``images``, that with hidden patches grey, and with the likeliest ids in their place.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        mask, dropped, hidden = self.draw(RowGenerator.for_rows(0, 0, len(images)))
        ids = self.target.by_patch(self.target.ids(images), self.encoder.grid)
        known = self.mosaic(ids).to(images.dtype)
        prediction = self.predict(ids, mask, dropped, hidden)
        return {"tokens": known} | self.target.pictures(prediction, known, self.encoder.grid, hidden)


class ClassQueryDecoder(nn.Module):
    """Copies the encoded class token to hidden places, adds learned positions, and runs a :class:`Trunk`.

    Args:
        dim: encoder width ``D``.
        patches: number of patches ``N``.
        num_prefix: prefix tokens ``P`` of the encoder, the class token first.
        out_dim: values predicted for a patch.
        width: decoder width ``E``.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(
        self, dim: int, patches: int, num_prefix: int, out_dim: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.project = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.zeros(1, num_prefix + patches, width))
        self.trunk = Trunk(num_prefix, out_dim, width, depth, heads)

    def forward(self, latent: Tensor, mask: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
        """Predictions ``(B, M, out_dim)``.

        Args:
            latent: ``(B, P + K, D)``.
            mask: ``(B, N)``, True = hidden, whether the encoder had a token there or not.
            kept: ``(B, K)``, the places of its tokens.
            hidden: ``(B, M)``, the places to predict.
        """
        prefix, patches = self.project(latent).tensor_split([self.num_prefix], dim=1)
        query = prefix[:, :1].expand(-1, mask.shape[1], -1)  # (B, N, E)
        whole = query.scatter(1, kept[..., None].expand_as(patches), patches)
        whole = torch.where(mask[..., None], query, whole)
        prediction: Tensor = self.trunk(torch.cat([prefix, whole], dim=1) + self.positions, hidden)
        return prediction
