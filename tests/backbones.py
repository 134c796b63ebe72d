"""The table of ``docs/backbones.md``: every timm name that could be a ViT, and what the encoder makes of it.

``python tests/backbones.py`` writes it again; two to three minutes of one core.
"""

from collections import defaultdict
from pathlib import Path

import timm
import torch

from mim.encoder import _skeleton
from mim.errors import UserError
from mim.reduction.attention import can_be_halved

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
PATTERNS = ("*vit*", "*eva*", "*deit*", "*dinov3*", "*pe_*")
BEGIN, END = "<!-- generated: python tests/backbones.py -->", "<!-- end -->"


def names() -> list[str]:
    return sorted({name for pattern in PATTERNS for name in timm.list_models(pattern)})


def verdict(name: str) -> tuple[str, str]:
    """Kind and traits of a model; traits of a refused one say what it is."""
    try:
        vit = _skeleton(name)
    except UserError as refusal:
        return "refused", str(refusal.why).partition(",")[0].removeprefix("it is ")
    rotary = getattr(vit, "rope", None)
    positions = ["learned"] * (vit.pos_embed is not None) + ["rotary"] * (rotary is not None)
    tokens = ["class token"] * (vit.cls_token is not None)
    registers = 0 if vit.reg_token is None else vit.reg_token.shape[1]
    tokens += [f"{registers} registers"] * (registers > 0) + ["distillation token"] * (
        getattr(vit, "dist_token", None) is not None
    )
    traits = [" and ".join(positions) or "no", "positions;", ", ".join(tokens) or "patches only"]
    if vit.cls_token is not None and not can_be_halved(vit.blocks[-1]):
        traits.append("(its attention cannot be read: no AttMask)")
    return ("rotary" if rotary is not None else "plain"), " ".join(traits)


def table() -> str:
    rows = defaultdict(list)
    for name in names():
        rows[verdict(name)].append(name)
    order = {"plain": 0, "rotary": 1, "refused": 2}
    lines = [f"timm {timm.__version__}: {sum(map(len, rows.values()))} names that match `{'`, `'.join(PATTERNS)}`.", ""]
    for kind in order:
        count = sum(len(found) for (own, _), found in rows.items() if own == kind)
        lines += [f"### {kind.capitalize()}: {count}", ""]
        lines += [
            f"- **{traits}** ({len(found)}): {', '.join(f'`{name}`' for name in found)}"
            for (own, traits), found in sorted(rows.items())
            if own == kind
        ]
        lines.append("")
    return "\n".join(lines)


def written() -> str:
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table().strip()}\n\n{END}{rest.partition(END)[2]}")
