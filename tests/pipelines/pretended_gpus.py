"""Stands in for what torch.cuda knows of devices: how many there are, and which is current."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class PretendedGpus:
    """``count`` GPUs that cannot compute. ``current`` is the thread's current one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.current = 0

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """As ``torch.cuda.device``."""
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "PretendedGpus":
        """Let torch.cuda say so."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        return self
