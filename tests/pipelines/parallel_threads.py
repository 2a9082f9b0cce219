"""Ranks as threads of one process: a group over gloo does not mind."""

from concurrent.futures import ThreadPoolExecutor

import torch

from redux_pipelines.parallel.group import connect

CPU = torch.device("cpu")


def on_ranks(folder, ranks, work, *, timeout_s=20.0):
    """What ``work(group)`` returns on each rank."""

    def run(rank):
        return work(connect(folder, rank, ranks, CPU, timeout_s=timeout_s))

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks)))
