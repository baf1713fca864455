"""The key-value cache: by depth, in place, rows chosen among the used part."""

import torch

from dstrain.nn.cache import KeyValueCache, is_identity


def filled(rows: int = 4, length: int = 3) -> tuple[KeyValueCache, torch.Tensor]:
    like = torch.empty(0)
    cache = KeyValueCache(depth=2, num_rows=rows, num_heads=2, max_length=5, head_dim=3, like=like)
    content = torch.randn(length, 2, 2, rows, 2, 1, 3)  # position, depth, key or value, row, head, 1, K
    for position in content:
        for depth in range(2):
            cache.at(depth).append(position[depth, 0], position[depth, 1])
        cache.advance(1)
    return cache, content.squeeze(-2).permute(1, 2, 3, 4, 0, 5)  # depth, key or value, row, head, position, K


def held(cache: KeyValueCache) -> torch.Tensor:
    """What each depth would see, without the position that the probe appends."""
    rows = cache.num_rows
    probe = torch.zeros(rows, 2, 1, 3)
    return torch.stack([torch.stack(cache.at(depth).append(probe, probe)) for depth in range(2)])[..., :-1, :]


def test_each_depth_keeps_its_own() -> None:
    cache, content = filled()
    assert cache.length == 3
    assert torch.equal(held(cache), content)


def test_rows_are_chosen_in_any_order() -> None:
    cache, content = filled()
    rows = torch.tensor([1, 1, 3, 2])
    cache.select(rows)
    assert torch.equal(held(cache), content[:, :, rows])


def test_fewer_rows_shrink_the_cache() -> None:
    cache, content = filled()
    cache.select(torch.tensor([0, 3]))
    assert cache.num_rows == 2
    assert torch.equal(held(cache), content[:, :, [0, 3]])


def test_what_was_appended_later_stays_when_rows_move_again() -> None:
    cache, content = filled(length=2)
    cache.select(torch.tensor([3, 2, 1, 0]))
    new = torch.randn(2, 4, 2, 1, 3)
    for depth in range(2):
        cache.at(depth).append(new[0], new[1])
    cache.advance(1)
    cache.select(torch.tensor([3, 2, 1, 0]))
    expected = torch.cat([content, new.flip(1).expand(2, 2, 4, 2, 1, 3)], dim=4)
    assert torch.equal(held(cache), expected)


def test_identity() -> None:
    assert is_identity(torch.tensor([0, 1, 2]))
    assert not is_identity(torch.tensor([0, 2, 2]))
