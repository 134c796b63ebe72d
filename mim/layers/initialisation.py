"""How weights are drawn before training."""

from torch import nn


def initialise(module: nn.Module) -> None:
    """Draw weights as masked autoencoders do (arXiv:2111.06377).

    Linear maps and the patch embedding are Xavier uniform, biases of linear maps zero, tokens normal with deviation
    0.02; the bias of the patch embedding keeps torch's default, learned positions keep timm's.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))
    for name, parameter in module.named_parameters():
        if name.endswith("_token"):
            nn.init.normal_(parameter, std=0.02)
