import torch

from mim.reduction import Tokens, distillation_loss


def test_distillation_is_of_answers_and_of_tokens_that_stay():
    logits, teacher = torch.randn(2, 5), torch.randn(2, 5)
    x, other = torch.randn(2, 1 + 3, 4), torch.randn(2, 1 + 3, 4)
    alive = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    tokens = Tokens.start(x, 1).hiding(alive)
    answers = (teacher.softmax(1) * (teacher.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    features = (x - other)[:, 1:][alive > 0].square().mean()
    torch.testing.assert_close(distillation_loss(logits, tokens, teacher, other), 0.5 * answers + 0.5 * features)
    torch.testing.assert_close(distillation_loss(logits, Tokens.start(x, 1), logits, x), torch.zeros(()))


def test_what_left_is_not_compared_and_what_merged_is_compared_patch_by_patch():
    logits, x, other = torch.zeros(1, 5), torch.randn(1, 1 + 4, 6), torch.randn(1, 1 + 4, 6)
    dropped = Tokens.start(x, 1).keep(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]))
    expected = 0.5 * (x - other)[:, [1, 3]].square().mean()
    torch.testing.assert_close(distillation_loss(logits, dropped, logits, other), expected)
    merged = Tokens.start(x, 1).merge(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.tensor([[0, 1]]))
    pairs = x[:, 1:].view(1, 2, 2, 6).mean(2).repeat_interleave(2, dim=1)
    expected = 0.5 * (pairs - other[:, 1:]).square().mean()
    torch.testing.assert_close(distillation_loss(logits, merged, logits, other), expected)
