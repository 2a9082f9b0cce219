"""What one rank gives, the others get."""

import pytest
import torch

from pipelines.parallel_threads import CPU, on_ranks
from redux_pipelines.parallel.group import GroupError, connect
from redux_pipelines.parallel.shares import Shares

SHARES = Shares((3, 2))


def numbers(*shape, dtype=torch.float32):
    return torch.arange(int(torch.tensor(shape).prod()), dtype=dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_go_to_their_ranks_and_back(tmp_path, dtype):
    rows = numbers(2, 5, 3, dtype=dtype)

    def work(group):
        if group.rank == 0:
            own = group.scatter(rows, SHARES)
        else:
            own = group.receive_share((2, 5, 3), dtype, SHARES)
        return own, group.gather(own * 2, SHARES)

    (first, gathered), (second, nothing) = on_ranks(tmp_path, 2, work)
    assert torch.equal(first, rows[:, :3])
    assert torch.equal(second, rows[:, 3:])
    assert torch.equal(gathered, rows * 2)
    assert nothing is None


def test_all_get_what_is_broadcast(tmp_path):
    def work(group):
        if group.rank == 0:
            group.broadcast(numbers(7))
            return numbers(7)
        return group.receive(7, torch.float32)

    assert all(torch.equal(each, numbers(7)) for each in on_ranks(tmp_path, 3, work))


def test_all_get_what_each_one_has(tmp_path):
    got = on_ranks(tmp_path, 3, lambda group: group.gather_all(numbers(2, 2) + group.rank))
    expected = torch.stack([numbers(2, 2) + rank for rank in range(3)])
    assert all(torch.equal(each, expected) for each in got)


def test_a_rank_that_does_not_come_is_an_error(tmp_path):
    with pytest.raises(GroupError, match="could not meet"):
        connect(tmp_path, 0, 2, CPU, timeout_s=0.5)


def test_a_rank_that_does_not_answer_is_an_error(tmp_path):
    def work(group):
        if group.rank == 1:
            return "silent"
        with pytest.raises(GroupError, match="failed"):
            group.receive(1, torch.float32)
        return "not answered"

    assert on_ranks(tmp_path, 2, work, timeout_s=0.5) == ["not answered", "silent"]
