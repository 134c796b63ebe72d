"""A linear probe as a classifier of its own: the frozen encoder with the head that was learned on its features."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mim.conv_encoder import ConvEncoder
from mim.errors import UserError
from mim.evaluation.features import Features
from mim.program import origin
from mim.randomness import keyed_generator
from mim.run.weights import ModelCard, export_backbone
from mim.transfer.classification import Classification


def export_probe(measurement: Classification, features: Features, layer: nn.Linear, folder: Path) -> Path:
    """Writes a timm folder; the encoder is taken apart.

    Args:
        measurement: encoder and images that were measured.
        features: what the head reads.
        layer: the head, on the CPU.
        folder: where to.

    Raises:
        UserError: if timm's model of this kind would not answer as the probe does.
    """
    encoder = measurement.loaded.encoder.cpu()
    images = torch.rand(2, encoder.in_chans, *encoder.img_size, generator=keyed_generator("probe"))
    with torch.no_grad():
        expected = layer(features.of(encoder, images))
    net = cast(Any, encoder.vit)
    pooling = () if isinstance(encoder, ConvEncoder) else ("avg" if features.pool == "mean" else "token",)
    net.reset_classifier(layer.out_features, *pooling)
    net.get_classifier().load_state_dict(layer.state_dict())
    with torch.no_grad():
        difference = float((net.eval()(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference < 1e-4:
        raise UserError(
            f"--export true: timm's {type(net).__name__} pools in another way than the probe, by {features.describe()}",
            why=f"their answers differ by {difference:.1g} of the largest",
            hint="--pool mean" if features.pool == "cls" else "--export false",
        )
    card = ModelCard(
        method="linear probe",
        data=measurement.options.data,
        images=len(measurement.train),
        command=origin("linear_probe"),
        notes=(f"Classes, in order: {', '.join(measurement.classes)}",),
    )
    scale = measurement.loaded.pixels.exported(measurement.loaded.mean, measurement.loaded.std)
    export_backbone(net, folder, card=card, class_names=measurement.classes, img_size=encoder.img_size, **scale)
    return folder
