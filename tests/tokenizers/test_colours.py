import torch

from mim.tokenizers.colours import recoloured


def test_a_map_gets_the_statistics_of_its_donor_and_keeps_its_own_of_itself():
    vectors, donors = torch.randn(2, 4, 5, 3) * 2 + 1, torch.rand(2, 4, 5, 3)
    changed = recoloured(vectors, donors)
    torch.testing.assert_close(changed.mean((1, 2)), donors.mean((1, 2)))
    torch.testing.assert_close(changed.std((1, 2)), donors.std((1, 2)))
    torch.testing.assert_close(recoloured(vectors, vectors), vectors)


def test_order_of_places_stays_and_a_flat_map_becomes_the_donors_mean():
    vectors, donors = torch.randn(1, 3, 3, 2), torch.rand(1, 3, 3, 2)
    assert torch.equal(recoloured(vectors, donors).flatten(1, 2).argsort(1), vectors.flatten(1, 2).argsort(1))
    flat = recoloured(torch.full((1, 3, 3, 2), 0.3), donors)
    torch.testing.assert_close(flat, donors.mean((1, 2), keepdim=True).expand_as(flat))
