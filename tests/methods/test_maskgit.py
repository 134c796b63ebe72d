import pytest
import torch
import torch.nn.functional as F

from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.decoding import Decoding
from mim.methods import MaskGIT
from mim.targets import TokenTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def build(model="vit_tiny_patch16_224", classes=0, **encoder):
    arguments = {"img_size": 16, "patch_size": 4, "kwargs": KWARGS} | encoder
    method = MaskGIT(Encoder(model, **arguments), target=TokenTarget(smoothing=0.1), classes=classes)
    method.log = lambda *_, **__: None
    return method


def step(method, images, labels=None, valid=None):
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    return method.training_step(([images], labels, *([[valid]] if valid is not None else [])), 0)


def mask_of(method, images):
    return method.masking(len(images), method.encoder.grid, generator=method.row_generator(len(images), 0))


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16)


@pytest.mark.parametrize("settings", [{}, {"img_size": (8, 16)}, {"classes": 4}, {"model": "vit_small_patch16_dinov3"}])
def test_the_loss_equals_a_slow_loop(settings):
    method = build(**settings)
    images, labels = torch.randn(3, 3, *method.encoder.img_size), torch.tensor([0, 3, -1])
    mask, ids = mask_of(method, images), method.target.ids(images).flatten(1)
    total = 0.0
    for image in range(3):
        logits = method.head(method.encode(ids, mask, labels)[image])
        errors = []
        for place in mask[image].nonzero()[:, 0].tolist():
            log_p = logits[place].log_softmax(0)
            errors.append(-(0.9 * log_p[ids[image, place]] + 0.1 * log_p.mean()).item())
        total += sum(errors) / len(errors)
    assert step(method, images, labels).item() == pytest.approx(total / 3, rel=1e-4)


def test_logits_that_know_nothing_cost_the_logarithm_of_the_codebook(images):
    method = build()
    method.target.smoothing = 0.0
    torch.nn.init.zeros_(method.head[-1].weight)
    assert step(method, images).item() == pytest.approx(torch.tensor(256.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("classes", [0, 3])
def test_every_trainable_parameter_gets_a_gradient(images, classes):
    method = build(classes=classes)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_hidden_ids_move_no_answer_and_visible_ones_do(images):
    method = build().eval()
    mask, ids = mask_of(method, images), method.target.ids(images).flatten(1)
    answer = method.encode(ids, mask)
    assert torch.equal(method.encode(torch.where(mask, 7, ids), mask), answer)
    assert not torch.equal(method.encode(torch.where(mask, ids, (ids + 1) % 256), mask), answer)


def test_a_class_matters_and_an_unknown_one_is_none(images):
    method, ids = build(classes=3).eval(), torch.zeros(2, 16, dtype=torch.long)
    hidden = torch.ones(2, 16).bool()
    told = [method.encode(ids, hidden, torch.tensor(labels)) for labels in ([0, 1], [-1, -1], [3, 9])]
    assert not torch.equal(told[0][0], told[0][1])
    assert torch.equal(told[1], told[2])
    assert torch.equal(method.encode(ids, hidden), told[1])


def test_what_was_not_measured_is_no_target(images):
    method, valid = build(), torch.ones(3, 1, 16, 16, dtype=torch.bool)
    valid[0] = False
    assert step(method, images, valid=valid).item() < step(method, images).item()


@pytest.mark.parametrize(
    "model", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"]
)
def test_drawn_images_are_a_function_of_seed_and_row_and_filling_keeps_what_is_known(images, model):
    method = build(model, classes=2).eval()
    few, whole = Decoding(steps=3), torch.ones(3, 16, dtype=torch.bool)
    drawn = method.draw_images(images, whole, 0, few, [1])
    assert torch.equal(method.draw_images(torch.zeros_like(images[:2]), whole[:2], 0, few, [1]), drawn[:2])
    assert drawn.shape == (3, 3, 16, 16)
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, :4] = True
    filled = method.target.ids(method.draw_images(images, hidden, 0, few)).flatten(1)
    assert torch.equal(filled[:, 4:], method.target.ids(images).flatten(1)[:, 4:])
    with pytest.raises(UserError, match="--classes 2"):
        method.draw_images(images, whole, 0, few, [2])


def test_patches_of_several_tokens_are_refused_with_a_size_that_works():
    with pytest.raises(UserError, match="patches of 8 px") as error:
        build(patch_size=8).check()
    assert error.value.hint == "--patch_size 4"


def test_pictures_show_tokens_what_is_hidden_and_two_fillings(images):
    pictures = build().eval().visualize(images)
    assert list(pictures) == ["tokens", "hidden", "filled in", "another"]
    seen = pictures["hidden"].ne(0).all(1, keepdim=True)
    assert torch.equal(pictures["filled in"] * seen, pictures["hidden"] * seen)


def test_cross_entropy_of_several_tokens_is_their_mean():
    target = TokenTarget()
    logits, ids = torch.randn(2, 3, 4 * 256), torch.randint(256, (2, 3, 4))
    slow = F.cross_entropy(logits.view(-1, 256), ids.flatten(), reduction="none").view(2, 3, 4).mean(-1)
    torch.testing.assert_close(target.error(logits, ids), slow)


def test_an_unknown_id_makes_the_error_of_its_patch_nan():
    logits, ids = torch.randn(1, 3, 4 * 256), torch.randint(256, (1, 3, 4))
    ids[0, 1, 2] = -1
    assert TokenTarget().error(logits, ids).isnan().tolist() == [[False, True, False]]


def test_ids_by_patch_come_back_by_place():
    ids = torch.arange(2 * 4 * 6).view(2, 4, 6)
    patches = TokenTarget.by_patch(ids, (2, 2))
    assert patches[0, 1].tolist() == [3, 4, 5, 9, 10, 11]
    assert torch.equal(TokenTarget.by_place(patches, (2, 2), (2, 3)), ids)
