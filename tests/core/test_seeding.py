from __future__ import annotations

import itertools

import pytest
import torch

from lora_dag.core import seeding


def test_golden_key() -> None:
    """Changing this number changes every training, split and sample that anyone has made with the project."""
    assert seeding.key(0, "noise", 3, 1) == 6549423864514414816


def test_key_depends_on_every_argument_and_on_where_one_ends() -> None:
    calls = [
        (0, "noise", 3, 1),
        (1, "noise", 3, 1),
        (0, "timestep", 3, 1),
        (0, "noise", 4, 1),
        (0, "noise", 3, 2),
        (0, "noise", 1, 3),
        (0, "noise", 31),
        (0, "noise", 3),
        (0, "noise3", 1),
        (0, "noise", 3, 1, 0),
        (0, "noise", "a", "bc"),
        (0, "noise", "ab", "c"),
    ]
    keys = [seeding.key(*call) for call in calls]
    assert len(set(keys)) == len(calls)
    assert keys == [seeding.key(*call) for call in calls]


def test_keys_are_what_torch_accepts_and_do_not_collide() -> None:
    keys = {seeding.key(0, "noise", step, slot) for step in range(100) for slot in range(100)}
    assert len(keys) == 10_000
    assert all(0 <= key < 2**63 for key in keys)


def test_generator_is_the_key_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first = torch.rand(3, generator=seeding.generator(0, "noise", 3, 1))
    torch.rand(5, generator=seeding.generator(0, "noise", 3, 2))
    assert torch.equal(torch.rand(3, generator=seeding.generator(0, "noise", 3, 1)), first)
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(seeding.key(0, "noise", 3, 1))), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_permutation_covers(size: int) -> None:
    assert sorted(seeding.permutation(0, 0, size)) == list(range(size))


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = {seeding.permutation(seed, epoch, 50) for seed, epoch in itertools.product(range(4), repeat=2)}
    assert len(orders) == 16
    assert seeding.permutation(2, 3, 50) in orders
