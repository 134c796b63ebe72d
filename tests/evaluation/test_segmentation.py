"""Heads, windows and scores of segmentation against exact references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import MulticlassJaccardIndex

from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.segmentation import SegmentationOptim, SemanticSegmentation, scores_of
from mim.evaluation.segmentation_heads import KNNHead, LinearHead, UPerHead, patch_labels
from mim.evaluation.windows import Inference, predict, slide, whole
from mim.options.segmentation import SegmentationRecipe
from mim.schedules import warmup_poly


def test_the_linear_head_reaches_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator) * 1.5
    labels = torch.randint(0, 3, (4, 6, 6), generator=generator)
    features = centres[labels].permute(0, 3, 1, 2) + torch.randn(4, 8, 6, 6, generator=generator)
    head = LinearHead(8, 1, 3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(head([features])[0], labels).backward()
        optimizer.step()
    rows, truth = features.permute(0, 2, 3, 1).reshape(-1, 8).numpy(), labels.flatten().numpy()
    reference = LogisticRegression(C=1e6, max_iter=1000).fit(rows, truth).score(rows, truth)
    ours = (head.eval()([features])[0].argmax(1) == labels).float().mean()
    assert float(ours) == pytest.approx(reference, abs=0.01)


def test_the_knn_head_equals_a_brute_force_loop():
    bank, labels, query = torch.randn(30, 5), torch.randint(0, 4, (30,)), torch.randn(2, 5, 3, 3)
    shares = KNNHead(bank, labels, 4, k=7)([query])[0]
    for b in range(2):
        for y in range(3):
            for x in range(3):
                cosines = F.cosine_similarity(bank, query[b, :, y, x][None])
                near = cosines.argsort(descending=True)[:7].tolist()
                votes = np.zeros(4)
                for i in near:
                    votes[labels[i]] += np.exp(cosines[i] / 0.07)
                np.testing.assert_allclose(shares[b, :, y, x], votes / votes.sum(), atol=1e-5)


def test_the_class_of_a_patch_is_that_of_most_of_its_pixels():
    classes = torch.tensor([[[0, 0, -1, -1], [0, 1, -1, 2], [1, 1, -1, -1], [1, 0, -1, -1]]])
    assert patch_labels(classes, (2, 2), 3).tolist() == [[[0, 2], [1, -1]]]


def test_upernet_on_a_shallow_encoder_is_refused_with_a_head_that_is_not():
    with pytest.raises(UserError, match="reads four blocks, and the encoder has 2") as mistake:
        SegmentationRecipe(head="upernet").blocks(2)
    assert mistake.value.hint == "--head linear"
    assert SegmentationRecipe(head="linear").blocks(2) == [1]


def test_upernet_gives_four_times_the_grid_and_an_auxiliary_answer_in_training():
    head = UPerHead(8, 3, auxiliary=4)
    taps = [torch.randn(2, 8, 5, 5) for _ in range(4)]
    answer, auxiliary = head(taps)
    assert answer.shape == (2, 3, 20, 20)
    assert auxiliary.shape == (2, 3, 5, 5)
    (answer.sum() + auxiliary.sum()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert len(head.eval()(taps)) == 1


def pixelwise(images):
    return torch.cat([images.sum(1, keepdim=True), images[:, :1]], dim=1)


def test_sliding_equals_whole_where_a_pixel_needs_no_neighbours():
    images = torch.randn(2, 3, 37, 50)
    torch.testing.assert_close(slide(pixelwise, images, crop=16, stride=11), whole(pixelwise, images, (8, 8)))


def test_sliding_equals_whole_for_an_image_of_one_window():
    encoder = Encoder("test_vit", img_size=32, patch_size=8, dynamic_img_size=True).eval()
    model = segmenter(encoder).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(slide(model, images, 32, 21), whole(model, images, (8, 8)))


def test_every_pixel_is_seen_and_small_images_are_filled():
    for size in ((16, 16), (5, 40), (33, 17)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(slide(pixelwise, images, 16, 9), pixelwise(images))


def test_several_scales_and_mirrors_give_mean_probabilities():
    images = torch.randn(1, 3, 24, 24)
    how = Inference("whole", 24, 16, scales=(1.0, 0.5), flip=True, patch=(8, 8))
    shares = predict(pixelwise, images, (48, 48), how)
    assert shares.shape == (1, 2, 48, 48)
    torch.testing.assert_close(shares.sum(1), torch.ones(1, 48, 48))


def segmenter(encoder, classes=3, finetune=False, **kwargs):
    how = Inference("slide", 32, 21, patch=(8, 8))
    return SemanticSegmentation(
        encoder,
        LinearHead(encoder.dim, 1, classes, False),
        [1],
        classes,
        SegmentationOptim(1e-2, 10),
        how,
        finetune,
        **kwargs,
    )


def test_scores_are_those_of_torchmetrics_over_classes_that_occur():
    truth, answers = torch.randint(0, 3, (2, 20, 20)), torch.randint(0, 3, (2, 20, 20))
    truth[0, :3] = -1
    model = segmenter(Encoder("test_vit", img_size=32, patch_size=8), classes=4)
    model.confusion.update(answers, truth)
    scores = scores_of(model.confusion.compute())
    per_class = MulticlassJaccardIndex(4, average="none", ignore_index=-1)(answers, truth)
    assert scores.iou[:3] == pytest.approx(per_class[:3].tolist())
    assert np.isnan(scores.iou[3])
    assert scores.miou == pytest.approx(float(per_class[:3].mean()))
    known = truth >= 0
    assert scores.pixel_accuracy == pytest.approx(float((answers == truth)[known].float().mean()))


def test_a_frozen_encoder_gets_no_gradient_and_stays_in_evaluation_mode():
    model = segmenter(Encoder("test_vit", img_size=32, patch_size=8)).train()
    model.head(model.features(torch.randn(2, 3, 32, 32)))[0].sum().backward()
    assert not model.encoder.training
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_an_encoder_that_was_loaded_to_be_measured_is_fine_tuned_in_training_mode():
    encoder = Encoder("test_vit", img_size=32, patch_size=8).eval()
    assert segmenter(encoder, finetune=True).encoder.training
    assert not segmenter(encoder).encoder.training


def test_layers_learn_slower_the_deeper_they_lie():
    model = segmenter(Encoder("test_vit", img_size=32, patch_size=8), finetune=True)
    scales = {id(p): g.get("lr_scale", 1.0) for g in model.configure_optimizers().param_groups for p in g["params"]}
    vit, depth = model.encoder.vit, len(model.encoder.vit.blocks)
    assert scales[id(model.head.classify.weight)] == 1
    assert scales[id(vit.blocks[-1].attn.qkv.weight)] == pytest.approx(0.65)
    assert scales[id(vit.blocks[0].attn.qkv.weight)] == pytest.approx(0.65**depth)
    assert scales[id(vit.patch_embed.proj.weight)] == pytest.approx(0.65 ** (depth + 1))


def test_the_learning_rate_rises_and_falls_on_lines():
    assert warmup_poly(0, 10, 100, 1.0) == pytest.approx(1e-6)
    assert warmup_poly(10, 10, 100, 1.0) == pytest.approx(0.9)
    assert warmup_poly(100, 10, 100, 1.0) == 0
