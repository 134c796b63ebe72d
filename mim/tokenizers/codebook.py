"""A codebook that follows what it encodes: moving averages of the vectors that each code stands for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 1 << 16  # vectors that are compared with all codes at once
_DECAY = 0.97  # of the averages, per step; a code that nothing needs is used up after 80 steps
_DEAD = 0.1  # share of the mean use below which a code starts again


class Codebook(nn.Module):
    """``V`` vectors of width ``E``; online k-means (arXiv:1711.00937, appendix A.1) moves them.

    Args:
        codes: number of vectors ``V``.
        width: of a vector, ``E``.
    """

    codes: Tensor
    uses: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(codes, width))
        # How often a code was used, and the sum of what it was used for: averages over steps, for fitting alone.
        self.register_buffer("uses", torch.zeros(codes), persistent=False)
        self.register_buffer("sums", torch.zeros(codes, width), persistent=False)

    def __len__(self) -> int:
        """Number of codes."""
        return len(self.codes)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., E)`` of ``ids (...)``."""
        return F.embedding(ids, self.codes)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Ids ``(...)`` int64 of the codes that are nearest to ``vectors (..., E)``; of equally near ones the first.

        -1 where no distance can be told, because a vector or a code is not finite.
        """
        flat, lengths = vectors.reshape(-1, vectors.shape[-1]).float(), self.codes.square().sum(1)
        nearest = [(lengths - 2 * part @ self.codes.T).min(1) for part in torch.split(flat, _ROWS)]
        ids = [torch.where(found.values.isfinite(), found.indices, -1) for found in nearest]
        return torch.cat(ids).view(vectors.shape[:-1])

    @torch.no_grad()
    def start(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Makes random ones of ``vectors (M, E)`` the codes; they may be fewer than there are codes."""
        self.codes.copy_(_some(vectors, len(self.codes), generator))
        self.uses.fill_(len(vectors) / len(self.codes))
        self.sums.copy_(self.codes * self.uses[:, None])

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor, generator: torch.Generator) -> None:
        """Moves every code towards the vectors ``(M, E)`` with its id ``(M,)``; hardly used codes start again at some.

        Args:
            vectors: what was encoded.
            ids: as :meth:`nearest` gives them.
            generator: tells at which vectors codes start again.
        """
        used = F.one_hot(ids, len(self.codes)).to(vectors.dtype)  # (M, V)
        self.uses.lerp_(used.sum(0), 1 - _DECAY)
        self.sums.lerp_(used.T @ vectors, 1 - _DECAY)
        mean = len(vectors) / len(self.codes)
        dead = (self.uses < _DEAD * mean)[:, None]
        fresh = _some(vectors, len(self.codes), generator)
        self.sums.copy_(torch.where(dead, fresh * mean, self.sums))
        self.uses.copy_(torch.where(dead[:, 0], mean, self.uses))
        self.codes.copy_(self.sums / self.uses[:, None])


def _some(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``(count, E)`` of ``vectors (M, E)``, each once before any twice."""
    rounds = -(-count // len(vectors))
    order = torch.cat([torch.randperm(len(vectors), generator=generator) for _ in range(rounds)])
    return vectors[order[:count].to(vectors.device)]
