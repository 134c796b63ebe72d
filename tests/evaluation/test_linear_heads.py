"""Heads on frozen features against references: scikit-learn, torch's optimizers, loops."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from mim.evaluation.attentive import MultiQueryPooling, fit_attentive
from mim.evaluation.bank import Bank
from mim.evaluation.batches import shuffled
from mim.evaluation.linear_probe import LinearHeads, fit_linear
from mim.evaluation.rate_selection import probe_head
from mim.options.classification import ProbeRecipe
from mim.schedules import warmup_cosine

ROWS = torch.arange(90)


def bank(rows=90, classes=3, dim=5, seed=0, tokens=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    shape = (rows, dim) if tokens is None else (rows, tokens, dim)
    features = torch.randn(shape, generator=generator)
    centres = 1.2 * torch.eye(classes, dim)[labels]
    return Bank(features + (centres if tokens is None else centres[:, None]), labels)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_head_alone_is_one_layer_that_answers_the_same(norm):
    recipe = ProbeRecipe(lrs=(0.1, 1.0), epochs=4, warmup_epochs=1, batch_size=32, norm=norm)
    heads = fit_linear([bank()], ROWS, recipe, 3, seed=1)
    for place in range(2):
        expected = heads(bank().features)[:, place]
        torch.testing.assert_close(heads.alone(place)(bank().features), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("select", ["held_out", "on_test"])
def test_the_layer_of_an_outcome_gives_its_answers(select):
    recipe = ProbeRecipe(epochs=3, warmup_epochs=1, batch_size=32, select=select)
    outcome = probe_head([bank()], bank(30, seed=3), recipe, 3, seed=1)
    assert outcome.layer(bank(30, seed=3).features).argmax(1).tolist() == outcome.answers.tolist()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_heads_of_a_sweep_are_those_trained_one_by_one(optimizer, norm):
    recipe = ProbeRecipe(lrs=(0.01, 0.1, 1.0), epochs=4, warmup_epochs=1, batch_size=32, optimizer=optimizer, norm=norm)
    together = fit_linear([bank()], ROWS, recipe, 3, seed=1)
    for place, lr in enumerate(recipe.rates):
        alone = fit_linear([bank()], ROWS, replace(recipe, lrs=(lr,)), 3, seed=1)
        torch.testing.assert_close(together.weight[:, [place]], alone.weight)
        torch.testing.assert_close(together.bias[[place]], alone.bias)


def test_sgd_is_torchs_own_on_batch_norm_and_linear():
    recipe = ProbeRecipe(lrs=(0.4,), epochs=3, warmup_epochs=1, batch_size=32)
    start = LinearHeads(5, 3, 1, "batch", seed=1)
    norm, linear = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False), torch.nn.Linear(5, 3)
    linear.load_state_dict({"weight": start.weight[:, 0].T, "bias": start.bias[0]})
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.0, momentum=0.9)
    step = 0
    for epoch in range(3):
        for features, labels in shuffled([bank()], ROWS, 32, epoch, 1, "cpu"):
            optimizer.param_groups[0]["lr"] = 0.4 * 32 / 256 * warmup_cosine(step, 2, 6, 1.0, 0.0)
            optimizer.zero_grad()
            F.cross_entropy(linear(norm(features)), labels).backward()
            optimizer.step()
            step += 1
    heads = fit_linear([bank()], ROWS, recipe, 3, seed=1)
    torch.testing.assert_close(heads.weight[:, 0].T, linear.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(heads(bank().features)[:, 0], linear(norm.eval()(bank().features)).detach())


def test_a_lars_step_is_a_thousandth_of_the_weight_in_the_direction_of_the_gradient():
    start = LinearHeads(5, 3, 1, "none", seed=1)
    features, labels = next(shuffled([bank()], ROWS, 90, 0, 1, "cpu"))
    weight, bias = start.gradients(features, labels)
    recipe = ProbeRecipe(lrs=(0.5,), epochs=1, warmup_epochs=0, batch_size=90, optimizer="lars", norm="none")
    lr = 0.5 * 90 / 256
    heads = fit_linear([bank()], ROWS, recipe, 3, seed=1)
    step = lr * 0.001 * start.weight.norm() / weight.norm() * weight
    torch.testing.assert_close(heads.weight, start.weight - step)
    torch.testing.assert_close(heads.bias, start.bias - lr * bias)  # no trust ratio for biases


def test_a_long_training_reaches_the_optimum_that_scikit_learn_finds():
    data = bank()
    recipe = ProbeRecipe(lrs=(3.0,), epochs=600, warmup_epochs=0, batch_size=90)
    heads = fit_linear([data], ROWS, recipe, 3, seed=0)
    scaled = (data.features - data.features.mean(0)) / data.features.std(0, correction=0)
    reference = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(scaled, data.labels)
    expected = torch.from_numpy(reference.predict_log_proba(scaled)).float()
    inputs = (data.features - data.features.mean(0)) / (data.features.var(0, correction=0) + 1e-6).sqrt()
    logits = (inputs @ heads.weight[:, 0] + heads.bias[0]).log_softmax(1)
    loss = F.nll_loss(logits, data.labels)
    assert loss == pytest.approx(float(F.nll_loss(expected, data.labels)), abs=2e-4)


def test_the_probes_accuracy_is_that_of_logistic_regression():
    train, test = bank(600), bank(300, seed=1)
    reference = LogisticRegression(C=1e6, max_iter=1000).fit(train.features, train.labels)
    expected = reference.score(test.features, test.labels)
    outcome = probe_head([train], test, ProbeRecipe(epochs=60, warmup_epochs=2), 3, seed=0)
    assert 0.5 < expected < 0.95
    assert outcome.top1 == pytest.approx(expected, abs=0.015)
    assert outcome.top5 == 1
    assert outcome.top1 == float((outcome.answers == test.labels).double().mean())


def test_the_reported_images_have_no_say_in_the_choice():
    recipe = ProbeRecipe(lrs=(1e-4, 0.1, 10.0), epochs=3, warmup_epochs=0, batch_size=32)
    asked = [bank(30, seed=5), Bank(bank(30, seed=5).features, (bank(30).labels + 1) % 3)]
    first, second = (probe_head([bank()], queries, recipe, 3, seed=0) for queries in asked)
    assert first.lr == second.lr
    assert torch.equal(first.answers, second.answers)


def test_choosing_on_the_reported_images_never_reads_lower():
    recipe = ProbeRecipe(lrs=(1e-4, 0.1, 10.0), epochs=5, warmup_epochs=0, batch_size=32)
    queries = bank(60, seed=5)
    honest = probe_head([bank()], queries, recipe, 3, seed=0)
    assert probe_head([bank()], queries, replace(recipe, select="on_test"), 3, seed=0).top1 >= honest.top1


def test_epochs_take_the_crops_in_turn():
    banks = [Bank(torch.full((4, 2), float(i)), torch.zeros(4, dtype=torch.int64)) for i in range(3)]
    seen = [float(next(shuffled(banks, torch.arange(4), 4, epoch, 0, "cpu"))[0][0, 0]) for epoch in range(5)]
    assert seen == [0, 1, 2, 0, 1]


def test_an_epoch_shows_every_row_once_when_batches_fit():
    rows = torch.arange(3, 67)
    shown = torch.cat([labels for _, labels in shuffled([Bank(torch.zeros(90, 1), ROWS)], rows, 16, 0, 0, "cpu")])
    assert sorted(shown.tolist()) == rows.tolist()


@pytest.mark.parametrize("head", ["attentive", "multi_query"])
def test_attentive_heads_of_a_sweep_are_those_trained_one_by_one(head):
    recipe = ProbeRecipe(head=head, lrs=(1e-3, 1e-2), epochs=3, warmup_epochs=1, batch_size=32, queries=4)
    data = bank(dim=8, tokens=6)
    together = fit_attentive([data], ROWS, recipe, 3, seed=1)
    for place, lr in enumerate(recipe.rates):
        alone = fit_attentive([data], ROWS, replace(recipe, lrs=(lr,)), 3, seed=1)
        torch.testing.assert_close(together(data.features)[:, place], alone(data.features)[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["attentive", "multi_query"])
def test_attention_finds_the_one_token_that_tells(head):
    """The class stands in one token of 24 at a random place: the mean hides it in noise, a query finds it."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(480) % 2
    tokens = torch.randn(480, 24, 8, generator=generator)
    place = torch.randint(24, (480,), generator=generator)
    tokens[torch.arange(480), place] = (
        torch.where(labels == 1, 1.0, -1.0)[:, None] * torch.eye(8)[0] + 6 * torch.eye(8)[1]
    )
    train, test = Bank(tokens[:360], labels[:360]), Bank(tokens[360:], labels[360:])
    means = [Bank(part.features.mean(1), part.labels) for part in (train, test)]
    recipe = ProbeRecipe(head=head, lrs=(1e-2,), epochs=40, warmup_epochs=2, batch_size=60, queries=2)
    linear = ProbeRecipe(lrs=(0.3,), epochs=40, warmup_epochs=2, batch_size=60)
    assert probe_head([means[0]], means[1], linear, 2, seed=0).top1 < 0.75
    assert probe_head([train], test, recipe, 2, seed=0).top1 > 0.9


def test_multi_query_pooling_equals_a_loop():
    pooling, tokens = MultiQueryPooling(6, 3), torch.randn(2, 5, 6)
    rows = []
    for image in tokens:
        parts = []
        for query, value in zip(pooling.queries, pooling.value, strict=True):
            attention = torch.softmax(image @ query / 6**0.5, 0)
            parts.append(sum(share * (token @ value) for share, token in zip(attention, image, strict=True)))
        rows.append(torch.cat(parts))
    torch.testing.assert_close(pooling(tokens), torch.stack(rows))


def test_queries_must_divide_the_width():
    with pytest.raises(ValueError, match="5 queries do not divide the width 8"):
        MultiQueryPooling(8, 5)
