"""What token reductions are worth: images per second, arithmetic and memory of inference, side by side.

The whole model, timm's patch drop and all reductions take turns, step by step; speed is a ratio taken inside one turn.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mim.benchmark.training import Clock, Timing, compare, peak_allocation
from mim.reduction import TokenReducedViT
from mim.reduction.macs import count_macs
from mim.reduction.recipes import recipe


@dataclass
class Inference:
    """A model at work on one batch.

    Args:
        name: for tables.
        setting: what its knob is set to.
        model: in evaluation mode, on the images' device.
        images: ``(B, C, H, W)``.
        macs: multiply-adds per image by the formulas of :mod:`mim.reduction.macs`.
        precision: ``32-true`` or ``bf16-mixed``.
    """

    name: str
    setting: str
    model: nn.Module
    images: Tensor
    macs: int
    precision: str = "32-true"

    @torch.no_grad()
    def step(self) -> Timing:
        """One forward pass, timed."""
        clock, processor = Clock(self.images.device), time.process_time()
        self._forward()
        clock.mark()
        (forward,) = clock.laps()
        return Timing(forward, 0.0, 0.0, time.process_time() - processor)

    @torch.no_grad()
    def counted_macs(self) -> float:
        """Multiply-adds per image as torch counts them while the model runs."""
        # Fused attention on a CPU is unknown to torch's counter; the same products written out are known.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._forward()
        return float(counter.get_total_flops()) / 2 / len(self.images)

    @torch.no_grad()
    def memory(self) -> int:
        """Most bytes that a forward pass holds at once beyond weights and images."""
        if self.images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._forward()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self._forward()
        return peak_allocation(profiler)

    def _forward(self) -> Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            logits: Tensor = self.model(self.images)
        return logits


def contenders(
    vit: Any,  # noqa: ANN401 - a timm ViT
    names: Sequence[str],
    shares: Sequence[float],
    images: Tensor,
    precision: str,
) -> list[Inference]:
    """The whole model, then for each share of its multiply-adds timm's patch drop and every reduction in ``names``."""
    vit = vit.eval().to(images.device)
    found = [Inference("none", "", vit, images, count_macs(vit).total, precision)]
    for share in shares:
        found.append(patch_drop(vit, share, images, precision))
        for name in names:
            reduction = recipe(name).fit(vit, share)
            model = TokenReducedViT(vit, reduction).eval().to(images.device)
            macs = count_macs(vit, reduction).total
            found.append(Inference(name, repr(reduction.schedule), model, images, macs, precision))
    return found


def patch_drop(vit: Any, share: float, images: Tensor, precision: str) -> Inference:  # noqa: ANN401 - a timm ViT
    """Timm's own way to fewer tokens: patches dropped by chance before the first block, here outside training, too."""
    height, width = vit.patch_embed.grid_size
    whole = count_macs(vit).total
    kept = min(range(1, height * width + 1), key=lambda n: abs(count_macs(vit, patches=n).total - share * whole))
    model = copy.copy(vit)  # shares all weights
    model._modules = dict(vit._modules)
    model.patch_drop = PatchDropout(1 - (kept + 0.5) / (height * width), num_prefix_tokens=vit.num_prefix_tokens)
    model.patch_drop.train()
    macs = count_macs(vit, patches=kept).total
    return Inference("timm patch drop", f"{kept} of {height * width}", model, images, macs, precision)


def measure(models: Sequence[Inference], rounds: int) -> list[dict[str, Any]]:
    """Lets all take turns; one row of numbers for each, the first being what the others are held against."""
    timings = compare(models, rounds, between=lambda: None)
    rows = []
    for model, taken in zip(models, timings, strict=True):
        ratios = [whole.step / own.step for whole, own in zip(timings[0], taken, strict=True)]
        processor = [whole.processor / own.processor for whole, own in zip(timings[0], taken, strict=True)]
        seconds = median(timing.step for timing in taken)
        rows.append(
            {
                "name": model.name,
                "setting": model.setting,
                "gmac": model.macs / 1e9,
                "gmac_counted": model.counted_macs() / 1e9,
                "share": model.macs / models[0].macs,
                "seconds": seconds,
                "images_per_second": len(model.images) / seconds,
                "speedup": median(ratios),
                "speedup_fastest": min(t.step for t in timings[0]) / min(t.step for t in taken),
                "speedup_processor": median(processor),
                "memory_bytes": model.memory(),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    head = f"{'reduction':<17}{'setting':<38}{'GMAC':>7}{'counted':>9}{'share':>7}{'img/s':>8}"
    head += f"{'speed':>7}{'fastest':>9}{'cpu':>6}{'of MACs':>9}{'MiB':>7}"
    lines = [head]
    for row in rows:
        cells = f"{row['name']:<17}{row['setting']:<38}{row['gmac']:>7.2f}{row['gmac_counted']:>9.2f}"
        cells += f"{row['share']:>7.0%}{row['images_per_second']:>8.1f}"
        cells += f"{row['speedup']:>7.2f}{row['speedup_fastest']:>9.2f}"
        cells += f"{row['speedup_processor']:>6.2f}{row['speedup'] * row['share']:>9.0%}"
        cells += f"{row['memory_bytes'] / 2**20:>7.0f}"
        lines.append(cells)
    return "\n".join(lines)
