"""Rows in e4m3 share one piece of memory, which is as large as the largest of them."""

import torch

from redux_kernels.checks import check_quantized
from redux_pipelines.fp8.linear import E4M3
from redux_pipelines.fp8.workspace import Workspace


def rows(batch, count, width=8):
    return torch.zeros(batch, count, width, dtype=torch.bfloat16)


def test_room_is_what_operators_write_to():
    workspace = Workspace()
    for x, width in ((rows(1, 5), 8), (rows(3, 5), 40), (rows(2, 1), 8)):
        check_quantized(x, width, *workspace.room(x, width))


def test_the_same_rows_get_the_same_room():
    workspace = Workspace()
    first, again = (workspace.room(rows(1, 5), 16) for _ in range(2))
    assert first[0] is again[0]
    assert first[1] is again[1]


def test_all_rooms_lie_in_the_memory_of_the_largest():
    workspace = Workspace()
    asked = [(rows(1, 3), 8), (rows(2, 9), 40), (rows(1, 12), 8), (rows(1, 3), 8)]
    held = [workspace.room(*each) for each in asked][1:]  # the first was too small for what came
    for place, size in ((0, 2 * 9 * 40), (1, 4 * 2 * 9)):
        storages = {each[place].untyped_storage().data_ptr(): each[place] for each in held}
        (storage,) = (each.untyped_storage() for each in storages.values())
        assert storage.nbytes() == size
    assert workspace.room(*asked[1])[0].dtype == E4M3


def test_no_view_keeps_memory_that_was_too_small():
    workspace = Workspace()
    small = workspace.room(rows(1, 3), 8)
    workspace.room(rows(1, 30), 8)
    assert workspace.room(rows(1, 3), 8)[0].data_ptr() != small[0].data_ptr()
