import pytest
import torch

from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import TruncatedNormalMasking
from mim.methods import SeiT
from mim.targets import TokenTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def build(model="vit_tiny_patch16_224", low=0.6, smoothing=0.0, **encoder):
    arguments = {"img_size": 32, "patch_size": 8, "kwargs": KWARGS} | encoder
    target = TokenTarget(smoothing=smoothing)
    method = SeiT(Encoder(model, **arguments), TruncatedNormalMasking(low=low), target, 0.4, 16, 1, 2)
    torch.nn.init.normal_(method.decoder.positions)  # they start at 0, and would not tell places apart
    method.log = lambda *_, **__: None
    return method


def step(method, images, valid=None):
    labels = torch.zeros(len(images), dtype=torch.long)
    return method.training_step(([images], labels, *([[valid]] if valid is not None else [])), 0)


def drawn(method, images):
    return method.draw(method.row_generator(len(images), 0, "cpu"))


def patch_ids(method, images):
    return method.target.by_patch(method.target.ids(images), method.encoder.grid)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": (16, 32)},
        {"patch_size": 4},
        {"registers": 2},
        {"smoothing": 0.1},
        {"model": "vit_small_patch16_dinov3"},
        {"model": "vit_small_patch16_rope_mixed_224"},
    ],
)
def test_the_loss_equals_a_slow_loop(settings):
    method = build(**settings)
    images = torch.randn(3, 3, *method.encoder.img_size)
    mask, dropped, _ = drawn(method, images)
    ids, errors, prefix = patch_ids(method, images), [], method.encoder.num_prefix
    for image in range(3):
        row = slice(image, image + 1)
        seen = method.mosaic(ids[row])
        latent = method.encoder(seen, mask[row], method.mask_token, dropped=dropped[row])[0]
        projected = method.decoder.project(latent)
        tokens, left = [projected[place] for place in range(prefix)], iter(projected[prefix:])
        for place in range(method.patches):
            own = None if dropped[image, place] else next(left)
            tokens.append(projected[0] if mask[image, place] else own)
        answers = method.decoder.trunk(torch.stack(tokens)[None] + method.decoder.positions)[0]
        for place in mask[image].nonzero()[:, 0].tolist():
            for number, code in enumerate(answers[place].view(-1, 32)):
                log_p = method.logits(code).log_softmax(0)
                smooth = method.target.smoothing
                errors.append((-(1 - smooth) * log_p[ids[image, place, number]] - smooth * log_p.mean()).item())
    assert step(method, images).item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_logits_that_know_nothing_cost_the_logarithm_of_the_codebook(images):
    method = build()
    torch.nn.init.zeros_(method.logits[-1].weight)
    assert step(method, images).item() == pytest.approx(torch.tensor(256.0).log().item(), rel=1e-5)


def test_every_trainable_parameter_gets_a_gradient(images):
    method = build()
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_dropped_patches_are_hidden_ones_and_as_many_in_every_image(images):
    mask, dropped, hidden = drawn(build(), images)
    assert not (dropped & ~mask).any()
    assert dropped.sum(1).tolist() == [7] * 3  # 0.4 of 16, rounded up
    assert torch.equal(torch.zeros_like(mask).scatter(1, hidden, True), mask)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_hidden_ids_move_no_answer_and_visible_ones_do(images, model):
    method = build(model).eval()
    mask, dropped, hidden = drawn(method, images)
    ids = patch_ids(method, images)
    answer = method.predict(ids, mask, dropped, hidden)
    assert torch.equal(method.predict(torch.where(mask[..., None], 7, ids), mask, dropped, hidden), answer)
    other = torch.where(mask[..., None], ids, (ids + 1) % 256)
    assert not torch.equal(method.predict(other, mask, dropped, hidden), answer)


def test_which_of_the_hidden_patches_are_dropped_matters_to_the_encoder_alone(images):
    method = build().eval()
    mask, dropped, hidden = drawn(method, images)
    tokens = method.decoder(torch.zeros(3, 1 + 9, 16), mask, (~dropped).nonzero()[:, 1].view(3, 9), hidden)
    swapped = (mask & ~dropped) | (dropped & (dropped.cumsum(1) > (mask & ~dropped).sum(1, keepdim=True)))
    kept = (~swapped).nonzero()[:, 1].view(3, 9)
    assert torch.equal(method.decoder(torch.zeros(3, 1 + 9, 16), mask, kept, hidden), tokens)


def test_recoloured_ids_are_those_of_the_opposite_images_colours(images):
    method = build()
    ids, codebook = method.target.ids(images), method.target.tokenizer.codebook
    assert method.recoloured(ids, method.row_generator(3, 0, "cpu")) is ids  # 0 of them, as by default
    method.recolour = 1.0
    changed = method.recoloured(ids, method.row_generator(3, 0, "cpu"))
    assert torch.equal(changed[1], ids[1])  # opposite to itself
    vectors = codebook(ids)
    own, other = vectors[0].flatten(0, 1), vectors[2].flatten(0, 1)
    wanted = (own - own.mean(0)) / own.std(0) * other.std(0) + other.mean(0)
    slow = [(codebook.codes - vector).square().sum(1).argmin().item() for vector in wanted]
    assert changed[0].flatten().tolist() == slow
    method.recolour = 0.5
    chosen = method.row_generator(3, 0, "cpu").rand() < 0.5
    half = method.recoloured(ids, method.row_generator(3, 0, "cpu"))
    assert torch.equal(half, torch.where(chosen[:, None, None], changed, ids))


def test_what_is_hidden_does_not_depend_on_recolouring(images):
    drawn_masks = []
    for share in (0.0, 1.0):
        method = build()
        method.recolour = share
        predict = method.predict
        method.predict = lambda ids, *places, predict=predict: drawn_masks.append(places[0]) or predict(ids, *places)
        step(method, images)
    assert torch.equal(*drawn_masks)


def test_what_was_not_measured_is_no_target(images):
    method, valid = build(), torch.ones(3, 1, 32, 32, dtype=torch.bool)
    valid[0] = False
    whole, two = step(method, images), step(method, images, valid)
    assert step(method, images, torch.zeros_like(valid)).item() == 0
    assert torch.isfinite(two)
    assert whole != two


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"low": 0.3}, "drop 0.4 is more than the smallest share", "--model.init_args.drop 0.3"),
        ({"model": "vit_medium_patch16_gap_240"}, "does not have", "--method maskgit"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings, message, hint):
    with pytest.raises(UserError, match=message) as error:
        build(**settings).check()
    assert hint in error.value.hint


def test_patches_that_do_not_divide_into_tokens_are_refused_with_a_size_that_works():
    with pytest.raises(UserError, match="do not divide into tokens") as error:
        build(img_size=30, patch_size=6)
    assert error.value.hint == "--patch_size 8"


def test_pictures_show_tokens_what_is_hidden_and_the_likeliest_ids(images):
    pictures = build().eval().visualize(images)
    assert list(pictures) == ["tokens", "hidden", "reconstruction"]
    seen = pictures["hidden"].ne(0).all(1, keepdim=True)
    assert torch.equal(pictures["reconstruction"] * seen, pictures["tokens"] * seen)
