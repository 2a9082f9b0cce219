"""What a card that is sold, and one that is there, leave for a plan."""

import torch

from redux_pipelines.memory.cards import (
    CONTEXT_BYTES,
    GIB,
    UNSEEN_BYTES,
    Card,
    card_of,
    sold_as,
    with_free,
)


def test_gb_of_a_shop_and_bytes_of_a_card():
    """24 GB are sold, 24 GiB are there, of which torch reports 22.03 GiB where ECC is on."""
    kept = CONTEXT_BYTES + UNSEEN_BYTES
    assert sold_as(24).budget_bytes == int(22.03 * GIB) - kept
    for gigabytes in (8, 12, 16, 20, 24, 32, 48, 80, 141):
        assert sold_as(gigabytes).budget_bytes + kept < gigabytes * GIB
        assert sold_as(gigabytes).budget_bytes + kept > 0.9 * gigabytes * GIB
    assert sold_as(0.1).budget_bytes == 0


def test_what_is_free_is_not_all_for_the_plan():
    card = with_free("NVIDIA L4", 20 * GIB)
    assert (card.name, card.budget_bytes) == ("NVIDIA L4", 20 * GIB - UNSEEN_BYTES)
    assert with_free("full", 1).budget_bytes == 0


def test_what_a_gpu_has_is_the_least_of_what_is_free_and_what_is_allowed(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda _: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(cuda, "memory_reserved", lambda _: GIB)
    properties = type("Properties", (), {"name": "NVIDIA H100"})
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: properties)
    for fraction, free in ((1.0, 70), (0.25, 19)):
        monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda _, f=fraction: f)
        card = card_of(torch.device("cuda:0"))
        assert card == Card("NVIDIA H100", free * GIB - UNSEEN_BYTES)
