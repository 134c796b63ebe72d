"""A run folder as pretraining leaves it, with invented numbers and generated pictures."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mim.encoder import Encoder
from mim.pictures.strips import save_strip, strip

SUMMARY = {
    "method": "mae",
    "model": "vit_tiny_patch16_224",
    "data": "photos",
    "images": 2048,
    "classes": 12,
    "epochs": 100,
    "steps": 3200,
    "batch_size": 64,
    "loss": 0.412,
    "knn": 0.617,
    "linear": 0.684,
    "rankme": 118.3,
    "images_per_second": 1934.2,
    "wall_seconds": 7351.4,
    "device": "cpu",
    "seed": 0,
    "parameters": 21_665_664,
    "versions": {"python": "3.11.9", "torch": "2.14.1", "timm": "1.0.31", "lightning": "2.6.6"},
    "command": "python tools/pretrain.py --data photos --epochs 100",
    "git": "3f2c1ab",
    "probe": {
        "protocol": "Frozen features, mean of the patch tokens, 512 held-out images.",
        "knn": {
            "trained": [0.617, 0.609, 0.625],
            "untrained": [0.342, 0.339, 0.351],
            "pixels": [0.211, 0.207, 0.209],
            "chance": 0.083,
        },
        "linear": {
            "trained": [0.684, 0.679, 0.690],
            "untrained": [0.441, 0.436, 0.452],
            "pixels": [0.251, 0.262, 0.249],
            "chance": 0.083,
        },
    },
    "pool": "mean",
    "values": "0,255 in uint8 become 0 and 1",
    "levels": {
        "low": 0.0,
        "high": 255.0,
        "shares": [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]],
        "distinct": [256, 256, 249],
        "outside": 0.0,
        "missing": 0.125,
        "images": 16,
    },
    "architecture": {
        "encoder": "VisionTransformer",
        "width": 128,
        "blocks": 4,
        "heads": 4,
        "patch": [8, 8],
        "image": [64, 64],
        "channels": 3,
        "patches": [8, 8],
        "prefix_tokens": 1,
        "mask": "RandomMasking(ratio=0.6) hides 38 of 64 patches",
        "parts": {
            "encoder": {"kind": "Encoder", "parameters": 800_000, "trained": 799_000},
            "decoder": {"kind": "Decoder", "parameters": 70_000, "trained": 70_000},
        },
        "trained": 869_000,
        "exported": 800_000,
    },
    "changed": {
        "model.img_size": [None, 64],
        "epochs": [20, 100],
        "masking.ratio": [0.75, 0.6],
        "data": ["builtin", "photos"],
    },
    "export": "runs/001-mae-photos/export/backbone",
    "status": "finished",
}

METRICS = "step,epoch,train/loss,train/lr,train/data_wait,val/knn_top1,val/linear_top1,val/rankme,val/feature_std"


def write_metrics(folder: Path, steps: int = 3200, epochs: int = 100) -> None:
    """A falling loss every step; five evaluations, the first of the untrained encoder."""
    noise = np.random.default_rng(0).normal(size=steps + 1)
    lines = [METRICS]
    for step in range(steps + 1):
        done, epoch = step / steps, step * epochs // steps
        if step:
            lr = 6e-4 * min(1, done * 10) * (0.5 + 0.5 * np.cos(np.pi * done))
            loss = 0.4 + 0.6 * np.exp(-5 * done) + 0.02 * noise[step]
            lines.append(f"{step},{epoch},{loss:.5f},{lr:.4e},{abs(noise[step]) / 50:.3f},,,,")
        if step % (steps // 4) == 0:
            gain = 1 - np.exp(-3 * done)
            scores = 0.342 + 0.29 * gain, 0.441 + 0.255 * gain, 31 + 92 * gain, 0.41 + 0.4 * gain
            lines.append(f"{step},{epoch},,,," + ",".join(f"{score:.4f}" for score in scores))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_strips(folder: Path, images: torch.Tensor, epochs: tuple[int, ...] = (0, 25, 50, 75, 100)) -> None:
    """Strips of an untrained encoder whose weights and "reconstructions" differ from epoch to epoch."""
    (folder / "images").mkdir(exist_ok=True)
    patch = images.shape[-1] // 8
    hidden = torch.rand(len(images), 1, 8, 8).gt(0.4).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    for epoch in epochs:
        encoder = Encoder("test_vit", img_size=images.shape[-1], patch_size=patch)
        blurred = F.interpolate(F.adaptive_avg_pool2d(images, 8), images.shape[2:], mode="bilinear")
        share = 1 - epoch / (1.2 * max(epochs) or 1)
        pictures = {"hidden": images.where(~hidden, 0), "reconstruction": torch.lerp(images, blurred, share)}
        save_strip(
            strip(images, pictures, encoder, (0.5,) * 3, (0.25,) * 3), folder / "images" / f"epoch_{epoch:03d}.png"
        )


def write_fake_run(folder: Path, images: torch.Tensor | None = None) -> Path:
    """A finished run with everything the report knows; ``images`` ``(B, 3, S, S)`` normalised by 0.5 and 0.25."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("method: mae\ndata: photos\nmodel:\n  name: vit_tiny_patch16_224\n")
    (folder / "command.txt").write_text("python tools/pretrain.py --data photos --epochs 100\n")
    (folder / "env.txt").write_text("numpy 2.3.1\npillow 12.2.0\n")
    (folder / "bad_files.txt").write_text("photos/IMG_0042.jpg: image file is truncated\n")
    write_metrics(folder)
    write_strips(folder, torch.randn(2, 3, 32, 32) if images is None else images)
    evaluation = folder / "evaluation" / "segmentation"
    evaluation.mkdir(parents=True, exist_ok=True)
    result = {
        "title": "Semantic segmentation",
        "protocol": "Frozen, linear head, scored at full size, 0 and 255 ignored.",
        "metrics": {"mIoU": [0.412, 0.409, 0.418], "images": 256, "IoU per class": {"sky": 0.81, "road": 0.77}},
    }
    (evaluation / "metrics.json").write_text(json.dumps(result))
    return folder
