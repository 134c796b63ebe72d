import pytest
import torch
import torch.nn.functional as F

from mim.errors import UserError
from mim.tokenizers import VQGANTokenizer, load_tokenizer, save_tokenizer

SETTINGS = {"codes": 20, "dim": 5, "width": 32, "multiples": (1, 1, 2), "blocks": 2, "channels": 7}


def published(attention=(False, False, True), **settings):
    """Weights of a small VQGAN under the names of the public files, drawn at random."""
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(**(SETTINGS | {"attention": attention} | settings))
    weights = {name: torch.randn_like(value) * 0.2 for name, value in tokenizer.state_dict().items()}
    weights["quantize.embedding.weight"] = weights.pop("codebook.codes")
    return weights | {"loss.discriminator.main.0.weight": torch.zeros(1)}


class Slow:
    """The network as functions of named weights: levels in turn, nothing read off."""

    def __init__(self, weights, levels, blocks):
        self.weights, self.levels, self.blocks = weights, levels, blocks

    def conv(self, name, x, **how):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **how)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, name, x):
        if f"{name}.q.weight" not in self.weights:
            return x
        normed = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)  # (B, HW, HW)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def middle(self, name, x):
        x = self.block(f"{name}.block_1", x)
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", x))

    def vectors(self, images):
        x = self.conv("encoder.conv_in", 2 * images - 1, padding=1)
        for level in range(self.levels):
            for number in range(self.blocks):
                x = self.block(f"encoder.down.{level}.block.{number}", x)
                x = self.attention(f"encoder.down.{level}.attn.{number}", x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.conv(
            "encoder.conv_out", F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x))), padding=1
        )
        return self.conv("quant_conv", x).movedim(1, 3)

    def encode(self, images):
        vectors, codes = self.vectors(images), self.weights["quantize.embedding.weight"]
        return torch.cdist(vectors.flatten(1, 2), codes).argmin(-1).view(vectors.shape[:3])

    def decode(self, ids):
        x = self.conv("post_quant_conv", self.weights["quantize.embedding.weight"][ids].movedim(3, 1))
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", x, padding=1))
        for level in reversed(range(self.levels)):
            for number in range(self.blocks + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
                x = self.attention(f"decoder.up.{level}.attn.{number}", x)
            if level:
                x = self.conv(
                    f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1
                )
        return (self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1) + 1) / 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": (True, False, False)}, {"multiples": (1, 2), "attention": (False, False), "blocks": 1}],
)
@torch.no_grad()
def test_public_weights_give_the_ids_and_images_of_a_slow_network(settings, tmp_path):
    weights, whole = published(**settings), SETTINGS | settings
    slow = Slow(weights, len(whole["multiples"]), whole["blocks"])
    images = torch.rand(2, 3, 16, 24)
    vectors = slow.vectors(images).flatten(0, 2)
    weights["quantize.embedding.weight"].copy_(vectors[torch.randperm(len(vectors))[:20]])  # so that many are used
    tokenizer = VQGANTokenizer.from_weights(weights, "--tokenizer f.ckpt")
    side = tokenizer.stride
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 16 // side, 24 // side)
    assert len(ids.unique()) > 10
    assert torch.equal(ids, slow.encode(images))
    drawn = tokenizer.draw(tokenizer.codebook(ids))
    torch.testing.assert_close(drawn, slow.decode(ids), rtol=1e-4, atol=1e-4)
    save_tokenizer(tokenizer, tmp_path / "t.safetensors")
    again = load_tokenizer(str(tmp_path / "t.safetensors"))
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(again.decode(ids), tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {"quantize.embed.weight": w.pop("quantize.embedding.weight"), **w}, "Gumbel"),
        (lambda w: {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "diffusers"),
        (lambda w: {"blocks.0.attn.qkv.weight": torch.zeros(3)}, "quantize.embedding.weight is missing"),
        (lambda w: w | {"encoder.extra.weight": torch.zeros(1)}, "encoder.extra.weight"),
        (lambda w: {k: v for k, v in w.items() if k != "decoder.mid.attn_1.q.bias"}, "decoder.mid.attn_1.q.bias"),
        (lambda w: w | {"encoder.conv_in.weight": torch.zeros(12, 3, 3, 3)}, "levels have"),
        (lambda w: w | {"quantize.embedding.weight": torch.zeros(2, 3, 4)}, "unpack"),
    ],
)
def test_other_layouts_are_refused_by_what_was_found(change, said):
    with pytest.raises(UserError, match=r"--tokenizer f\.ckpt is no tokenizer that is read here") as error:
        VQGANTokenizer.from_weights(change(published()), "--tokenizer f.ckpt")
    assert said in error.value.why
