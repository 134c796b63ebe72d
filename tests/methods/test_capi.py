import numpy as np
import pytest
import torch
from grouped import grouped

from mim.encoder import Encoder
from mim.layers.sinkhorn import sinkhorn
from mim.masking import BlockMasking, RandomMasking, RectangleMasking
from mim.methods import CAPI, OptimConfig, Plan
from mim.methods.capi import ClusterConfig, set_apart
from mim.patches import unpatchify

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DINOV3 = "vit_small_patch16_dinov3"


def build(model="vit_tiny_patch16_224", masking=None, clusters=None, size=64, **settings):
    torch.manual_seed(0)
    encoder = Encoder(model, img_size=size, patch_size=8, kwargs=KWARGS, registers=2)
    clusters = clusters or ClusterConfig(count=6, blr=0.1)
    settings = {"predicted": 0.2} | settings
    method = CAPI(encoder, masking or RectangleMasking(), clusters, 8, 2, 2, **settings)
    method.plan = Plan(max_steps=10, batch_size=8)
    method.log = method.log_dict = lambda *_, **__: None
    method.setup("fit")
    return method


def step(method, images, valid=None):
    return method.training_step(([images], torch.zeros(len(images)), *([[valid]] if valid is not None else [])), 0)


def drawn(method, images):
    """Masks and places of a step, as the step draws them."""
    generator = method.row_generator(len(images), 0)
    mask = method.masking(len(images), method.encoder.grid, generator=generator)
    order = generator.rand(int(mask[0].sum())).argsort(dim=1)[:, : method.asked_count]
    hidden = mask.nonzero()[:, 1].view(len(images), -1)
    return mask, hidden.gather(1, order).sort(dim=1).values


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64)


@pytest.mark.parametrize(
    "settings", [{}, {"size": (32, 64)}, {"model": DINOV3}, {"masking": RandomMasking(0.5)}], ids=str
)
def test_the_loss_equals_a_slow_loop_over_images_and_patches(settings):
    method = build(**settings)
    images = torch.randn(3, 3, *method.encoder.img_size)
    mask, places = drawn(method, images)
    prefix = method.encoder.num_prefix
    taught = method.teacher.module(images)[:, prefix:]
    logits = method.clusters(taught / taught.norm(dim=-1, keepdim=True))  # (B, N, K)
    assigned = torch.stack([sinkhorn(logits[:, place], 0.06) for place in range(mask.shape[1])], dim=1)
    clusters = [
        -(target * (given / 0.12).log_softmax(0)).sum()
        for row in range(3)
        for target, given in zip(assigned[row], logits[row], strict=True)
    ]
    student, prototypes = [], method.prototypes.direction
    prototypes = method.prototypes.length * prototypes / prototypes.norm(dim=1, keepdim=True)
    for row in range(3):
        context = method.encoder(images[row : row + 1], mask[row : row + 1])
        for place in places[row]:
            query = method.predictor.mask_token + method.predictor.positions[place]
            for block in method.predictor.blocks:
                query = block(query, context)
            said = method.predictor.norm(query)[0, 0]
            said = prototypes @ (said / said.norm()) / 0.12
            student.append(-(assigned[row, place] * said.log_softmax(0)).sum())
    expected = torch.stack(student).mean() + torch.stack(clusters).mean()
    assert step(method, images).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", DINOV3])
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(images, model):
    method = build(model)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    assert all(p.grad is None for p in method.teacher.parameters())


def test_clusters_and_student_share_no_gradient(images):
    method = build()
    logged = {}
    method.log_dict = logged.update
    step(method, images)
    logged["train/clusters"].backward(retain_graph=True)
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {"clusters.weight", "clusters.bias"}
    method.zero_grad()
    logged["train/student"].backward()
    assert method.clusters.weight.grad is None
    assert method.prototypes.direction.grad.any()


def test_pixels_of_hidden_patches_never_change_a_prediction(images):
    method = build().eval()
    mask, places = drawn(method, images)
    area = unpatchify(mask[..., None].expand(-1, -1, 192).contiguous(), (8, 8), 8)
    before, after = (method.predict(pixels, mask, places) for pixels in (images, torch.where(area, images + 1, images)))
    assert torch.equal(before, after)
    assert not torch.equal(method.predict(images + 1, mask, places), before)


def test_a_query_changes_no_other_prediction(images):
    method = build().eval()
    mask, places = drawn(method, images)
    whole = method.predict(images, mask, places)
    torch.testing.assert_close(method.predict(images, mask, places[:, 2:5]), whole[:, 2:5])


def test_a_share_of_the_hidden_patches_is_asked_for_drawn_by_seed_step_and_row(images, monkeypatch):
    method = build()
    assert (method.hidden_count, method.asked_count) == (41, 8)  # of 64
    asked = []
    predict = method.predict
    monkeypatch.setattr(method, "predict", lambda *given: asked.append(given[1:]) or predict(*given))
    step(method, images)
    mask, places = drawn(method, images)
    assert torch.equal(asked[0][1], places)
    assert mask.gather(1, places).all()
    monkeypatch.setattr(method, "first_row", lambda *_: 2)
    step(method, images[2:])
    assert all(torch.equal(part, whole[2:]) for part, whole in zip(asked[1], asked[0], strict=True))
    monkeypatch.setattr(CAPI, "global_step", 1)
    step(method, images[2:])
    assert not torch.equal(asked[2][1], asked[1][1])


def test_two_processes_have_the_loss_and_the_gradient_of_one(images):
    def work(rank):
        method = build()
        method.first_row = lambda *_: 2 * rank
        loss = step(method, images[2 * rank : 2 * rank + 2])
        loss.backward()
        return loss.item(), method.clusters.weight.grad.numpy(), method.predictor.mask_token.grad.numpy()

    whole = build()
    loss = step(whole, images)
    loss.backward()
    parts = grouped(work)
    assert np.mean([part[0] for part in parts]) == pytest.approx(loss.item(), rel=1e-5)
    for number, parameter in ((1, whole.clusters.weight), (2, whole.predictor.mask_token)):
        mean = np.mean([part[number] for part in parts], axis=0)
        np.testing.assert_allclose(mean, parameter.grad, rtol=1e-4, atol=1e-6)


def test_patches_that_were_not_measured_are_in_no_balance_and_no_loss(images):
    method, valid = build(masking=RandomMasking(0.5), predicted=1.0), torch.ones(4, 1, 64, 64, dtype=torch.bool)
    valid[:, :, :, :8] = False  # the first column of patches
    assert torch.equal(step(method, images, valid), step(method, images, valid))
    before = step(method, images, valid)
    method.clusters.register_forward_hook(lambda *given: given[2] + valid_noise(given[2]))
    torch.testing.assert_close(step(method, images, valid), before)


def valid_noise(logits):
    """Other logits in the first column of 8 x 8 patches."""
    return torch.zeros_like(logits).index_fill(1, torch.arange(0, 64, 8), 3.0) * torch.arange(logits.shape[2])


# Optimizer ----------------------------------------------------------------------------------------------------------


def rates(method, step):
    return [
        (group.get("clusters", False), method.group_rate(group, step))
        for group in method.configure_optimizers().param_groups
    ]


def test_every_parameter_is_in_one_group_and_the_clusters_are_in_one_of_their_own():
    method = build(clusters=ClusterConfig(count=6, betas=(0.5, 0.6)), patch_rate=0.2)
    groups = method.configure_optimizers().param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    own = [group for group in groups if group.get("clusters")]
    assert {id(p) for group in own for p in group["params"]} == {id(p) for p in method.clusters.parameters()}
    assert {(group["betas"], group["weight_decay"]) for group in own} == {((0.5, 0.6), 0.0)}
    assert {group["betas"] for group in groups if not group.get("clusters")} == {(0.9, 0.95)}
    patches = [group for group in groups if group.get("lr_scale") == 0.2]
    assert {id(p) for group in patches for p in group["params"]} == {
        id(p) for p in method.encoder.vit.patch_embed.parameters()
    }
    assert {group["weight_decay"] for group in patches} == {0.0, 0.05}


def test_clusters_have_a_height_and_a_warm_up_of_their_own():
    optim = OptimConfig(blr=1.0, warmup_epochs=4)
    method = build(optim=optim, clusters=ClusterConfig(count=6, blr=0.1), cosine_share=1.0)
    assert {rate for own, rate in rates(method, 0) if own} == {0.1 * 8 / 256}
    assert {rate for own, rate in rates(method, 0) if not own} == {0.0}
    assert sorted({rate for own, rate in rates(method, 4) if not own}) == pytest.approx([0.2 / 32, 1 / 32])


def test_the_run_ends_where_the_cosine_was_cut():
    method = build(optim=OptimConfig(blr=32.0, warmup_epochs=0), cosine_share=0.5)
    assert method.learning_rate(0) == 1.0
    assert method.learning_rate(10) == pytest.approx(0.5)


def test_gradients_of_clusters_and_of_the_rest_are_clipped_apart(images):
    method = build(clusters=ClusterConfig(count=6, clip=1e-3), clip=1e-2)
    step(method, images).backward()
    method.on_before_optimizer_step(method.configure_optimizers())
    own = torch.nn.utils.get_total_norm([p.grad for p in method.clusters.parameters()])
    rest = [p.grad for n, p in method.named_parameters() if p.grad is not None and not n.startswith("clusters")]
    assert own.item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.nn.utils.get_total_norm(rest).item() == pytest.approx(1e-2, rel=1e-3)


def test_the_optimizers_state_finds_its_groups_again(images):
    first, second = build(), build()
    optimizers = [method.configure_optimizers() for method in (first, second)]
    step(first, images).backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    own, other = (optimizer.param_groups[-1] for optimizer in optimizers)
    assert [own["clusters"], other["clusters"]] == [True, True]
    moments = [
        optimizer.state[method.clusters.weight]["exp_avg"]
        for optimizer, method in zip(optimizers, (first, second), strict=True)
    ]
    assert torch.equal(*moments)


def test_groups_set_apart_multiply_the_rate_that_they_had():
    weight, bias = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [weight, bias], "lr_scale": 0.5}], lr=1.0)
    set_apart(optimizer, [bias], scale=0.2)
    assert [(len(group["params"]), group["lr_scale"]) for group in optimizer.param_groups] == [(1, 0.5), (1, 0.1)]


def test_the_teacher_moves_along_a_cosine_of_momenta_after_the_step():
    method = build(momentum=0.9)
    before = method.teacher.module.vit.norm.weight.clone()
    method.encoder.vit.norm.weight.data.fill_(3.0)
    method.after_optimizer_step(5)
    torch.testing.assert_close(method.teacher.module.vit.norm.weight, before + 0.05 * (3 - before))
    assert method.evaluated is method.teacher.module


@pytest.mark.parametrize("masking", [BlockMasking(unmasked_share=0.5)], ids=str)
def test_a_policy_that_hides_unequally_many_patches_is_refused(masking):
    with pytest.raises(ValueError, match="capi needs a policy that hides equally many patches, unguided"):
        build(masking=masking)


# Pictures and health ------------------------------------------------------------------------------------------------


def test_pictures_show_the_cluster_of_every_patch_and_the_one_that_was_predicted(images):
    method = build().eval()
    pictures = method.visualize(images)
    points = torch.nn.functional.normalize(method.teacher.module(images)[:, 3:], dim=-1)
    assert torch.equal(pictures["clusters"].flatten(1), method.clusters(points).argmax(-1))
    assert pictures["predicted"].shape == (4, 8, 8)
    assert ((pictures["hidden"] == 0).all(1).float().mean(dim=(1, 2)) * 64).tolist() == [41.0] * 4
    assert torch.equal(method.visualize(images)["predicted"], pictures["predicted"])


def test_what_is_logged_tells_agreement_sharpness_use_and_spread(images):
    method = build()
    logged = {}
    method.log_dict = logged.update
    with torch.no_grad():
        method.clusters.weight.zero_()
    step(method, images)
    assert logged["health/assignment_entropy"].item() == pytest.approx(1)  # all clusters alike
    assert logged["health/used"].item() == pytest.approx(1)
    assert "larger --batch_size, or fewer clusters" in method.health_warning({k: v.item() for k, v in logged.items()})
    for parameter in method.teacher.module.vit.norm.parameters():
        parameter.data.fill_(1.0 if parameter is method.teacher.module.vit.norm.bias else 0.0)
    step(method, images)
    assert logged["health/target_std"].item() == pytest.approx(0, abs=1e-6)
    assert "collapse" in method.health_warning({k: v.item() for k, v in logged.items()})
    assert method.health_warning({"health/target_std": 0.5, "health/assignment_entropy": 0.3}) is None
    assert method.health_warning({}) is None
