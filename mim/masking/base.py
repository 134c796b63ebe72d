"""What every masking policy is."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mim.randomness import RowGenerator


class Masking(nn.Module):
    """Decides which patches of an image are hidden.

    Attributes:
        guided: chooses by scores.
        ratio_settings: the arguments that say how much is hidden; ``--mask_ratio`` sets them all.
    """

    guided: ClassVar[bool] = False
    ratio_settings: ClassVar[tuple[str, ...]] = ()

    def extra_repr(self) -> str:
        """The policy's settings, as a run prints them before it starts."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value}" for name, value in own.items())

    @property
    def needs_scores(self) -> bool:
        """Whether there must be scores: those of guided policies decide unless their settings leave all to chance."""
        return self.guided

    def fit(self, grid: tuple[int, int]) -> None:
        """Told once, before the first mask, how many patches per side there are; settings that depend on it settle.

        Raises:
            ValueError: if the policy cannot serve such a grid.
        """

    def visible_count(self, patches: int) -> int | None:
        """How many of ``patches`` stay visible in every image; None if that differs between images."""
        return None

    def most_hidden(self, patches: int) -> int:
        """The most of ``patches`` that are ever hidden in an image."""
        return patches - (self.visible_count(patches) or 0)

    def count_words(self, grid: tuple[int, int]) -> str:
        """How many patches it hides, for people: always as many, or counted on 64 masks; nothing if scores decide."""
        patches = grid[0] * grid[1]
        if (visible := self.visible_count(patches)) is not None:
            return f" hides {patches - visible}"
        if self.needs_scores:
            return ""
        counts = self(64, grid, generator=RowGenerator.for_rows(0, 0, 64)).sum(1)
        low, high = int(counts.min()), int(counts.max())
        return f" hides {low}" + (f" to {high}" if high > low else "")

    def forward(
        self,
        batch_size: int,
        grid: tuple[int, int],
        *,
        scores: Tensor | None = None,
        progress: float = 0.0,
        generator: RowGenerator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw one mask per image.

        Args:
            batch_size: number of images ``B``.
            grid: ``(h, w)`` patches per side, ``N = h*w``.
            scores: ``(B, N)``, higher is hidden first; only guided policies look at them. A patch of ``-inf``
                holds next to nothing: policies that hide by scores hide it last.
            progress: share of training done, 0 to 1.
            generator: random numbers of each row; fresh ones, seeded by torch's global generator, if not given.
            device: where the masks are wanted; where they are drawn, the generator's device, if not given.

        Returns:
            ``(B, N)`` bool, True = hidden.

        Raises:
            ValueError: if the policy needs scores and there are none, or rows or scores of another batch.
        """
        if scores is None and self.needs_scores:
            raise ValueError(f"{type(self).__name__} needs scores: a method that has a teacher to give them")
        if scores is not None and scores.shape != (batch_size, grid[0] * grid[1]):
            raise ValueError(f"scores {tuple(scores.shape)} are not those of {batch_size} images of {grid} patches")
        if generator is None:
            generator = fresh_rows(batch_size, device if scores is None else scores.device)
        if len(generator) != batch_size:
            raise ValueError(f"random numbers for {len(generator)} images, but there are {batch_size}")
        if scores is not None:
            scores = scores.detach().float().to(generator.device)  # half precision would make ties
        return self.draw(generator, grid, scores, progress).to(device)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """One mask per row of ``generator``: what a policy is; call the policy itself, which checks what it is given.

        Args:
            generator: random numbers of the ``B`` rows; masks are drawn on its device.
            grid: ``(h, w)`` patches per side, ``N = h*w``.
            scores: ``(B, N)`` float32 on the same device, higher is hidden first; there if the policy needs them.
            progress: share of training done, 0 to 1.

        Returns:
            ``(B, N)`` bool, True = hidden.
        """
        raise NotImplementedError


def fresh_rows(batch_size: int, device: torch.device | str | None) -> RowGenerator:
    """Row keys drawn from torch's global generator."""
    return RowGenerator(torch.randint(2**62, (batch_size,), device=device), int(torch.randint(2**62, ())))


def check_ratios(low: float, high: float, unmasked_share: float) -> None:
    """Refuses a range of ratios, or a share of images in which nothing is hidden, that cannot be.

    Raises:
        ValueError: unless ``0 <= low <= high < 1`` and ``0 <= unmasked_share <= 1``.
    """
    if not 0 <= low <= high < 1 or not 0 <= unmasked_share <= 1:
        raise ValueError(f"need 0 <= low <= high < 1 and 0 <= unmasked_share <= 1, not {low}, {high}, {unmasked_share}")
