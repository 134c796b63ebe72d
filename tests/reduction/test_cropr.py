import pytest
import torch
import torch.nn.functional as F
from small_models import build

from mim.reduction import Cropr, TokenReducedViT, Tokens


def reducer(**settings):
    reduction = Cropr(dim=16, depth=4, num_classes=5, **{"r": 4, **settings})
    for parameter in reduction.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return reduction


def test_the_first_block_takes_one_more_and_the_last_two_none():
    reduction = Cropr(dim=16, depth=24, num_classes=5, r=8)
    counts = reduction.counts(196, 24)
    assert counts[:3] == [187, 179, 171]
    assert counts[-3:] == [19, 19, 19]
    assert len(reduction.routers) == 22


def test_the_folded_score_is_the_sum_of_all_logits():
    router, patches = reducer(queries=7).routers[0], torch.randn(2, 9, 16)
    torch.testing.assert_close(patches @ router.scorer, (patches @ router.queries.T).sum(2))


def test_a_router_reads_class_token_and_patches_in_one_head_without_projections():
    router, tokens = reducer(queries=3).routers[0], torch.randn(2, 1 + 9, 16)
    read = (router.queries @ tokens.transpose(1, 2) / 4).softmax(-1) @ tokens
    expected = router.head(router.norm(read + router.mlp(router.mlp_norm(read))))
    torch.testing.assert_close(router(tokens, 1), expected)


def test_queries_start_with_a_deviation_of_one_over_the_root_of_the_width():
    queries = Cropr(dim=256, depth=3, num_classes=5, queries=400).routers[0].queries
    assert abs(queries.std().item() * 16 / 0.8796 - 1) < 0.03  # of a normal one cut at two deviations


def test_weights_saved_without_the_norm_of_the_mlp_run_as_they_were_trained():
    old = {name: tensor for name, tensor in reducer().state_dict().items() if "mlp_norm" not in name}
    reduction, tokens = reducer(), torch.randn(2, 1 + 9, 16)
    reduction.load_state_dict(old)
    router, patches = reduction.routers[1], tokens[:, 1:]
    read = (router.queries @ patches.transpose(1, 2) / 4).softmax(-1) @ patches
    torch.testing.assert_close(router(tokens, 1), router.head(router.norm(read + router.mlp(read))))
    assert reduction.state_dict().keys() == old.keys()


def test_all_patches_come_out_in_the_order_they_came_in():
    vit = build("plain")
    wrapper = TokenReducedViT(vit, reducer())
    images = torch.randn(2, 3, 40, 40)
    tokens = wrapper.forward_tokens(images)
    assert tokens.assign.tolist() == [list(range(25))] * 2
    assert wrapper.reduction.counts(25, 4) == [20, 16, 16, 16]
    assert torch.equal(TokenReducedViT(vit, reducer(r=0))(images), vit(images))


def test_routers_learn_from_labels_and_leave_the_backbone_alone():
    vit = build("plain")
    wrapper = TokenReducedViT(vit, reducer()).train()
    tokens, labels = wrapper.forward_tokens(torch.randn(4, 3, 40, 40)), torch.tensor([0, 1, 2, 3])
    loss = wrapper.auxiliary_loss(tokens, labels)
    torch.testing.assert_close(loss, sum(F.cross_entropy(logits[:, 0], labels) for logits in tokens.auxiliary))
    assert len(tokens.auxiliary) == 2
    loss.backward()
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in wrapper.reduction.parameters())


def test_in_evaluation_nothing_auxiliary_is_computed():
    wrapper = TokenReducedViT(build("plain"), reducer()).eval()
    tokens = wrapper.forward_tokens(torch.randn(2, 3, 40, 40))
    assert tokens.auxiliary == ()
    assert wrapper.auxiliary_loss(tokens, torch.tensor([0, 1])).item() == 0


def test_the_best_patches_are_kept():
    reduction, x = reducer(), torch.randn(1, 1 + 6, 16)
    tokens = reduction.reduce(Tokens.start(x, 1), None, 2, 0)
    best = (x[0, 1:] @ reduction.routers[0].scorer).topk(2).indices.tolist()
    assert sorted(best) == [n for n in range(6) if tokens.assign[0, n] >= 0]


@pytest.mark.parametrize("size", [(40, 40), (50, 35)])
def test_with_masks_each_query_answers_for_the_first_pixel_of_its_patch(size):
    vit = build("plain")
    wrapper = TokenReducedViT(vit, reducer(queries=25, masks=True)).train()
    images, labels = torch.randn(2, 3, 40, 40), torch.randint(0, 5, (2, *size))
    labels[:, : size[0] // 5] = -1
    tokens = wrapper.forward_tokens(images)
    expected = 0.0
    for logits in tokens.auxiliary:
        answers = [
            F.cross_entropy(logits[image, 5 * row + column], labels[image, row * size[0] // 5, column * size[1] // 5])
            for image in range(2)
            for row in range(1, 5)
            for column in range(5)
        ]
        expected += torch.stack(answers).mean()
    torch.testing.assert_close(wrapper.auxiliary_loss(tokens, labels), expected)
    assert wrapper.auxiliary_loss(tokens, torch.full_like(labels, -1)).item() == 0


def test_a_router_starts_as_the_reference_does():
    router = Cropr(dim=256, depth=3, num_classes=40, queries=400).routers[0]
    assert router.queries.abs().max() <= 2 / 16  # truncated at two deviations
    assert abs(router.head.weight.std().item() / 0.02 - 1) < 0.03
    assert not router.head.bias.any()
    assert (router.mlp_norm.eps, router.norm.eps) == (1e-6, 1e-5)
