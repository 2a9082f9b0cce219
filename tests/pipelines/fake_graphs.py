"""Stand-ins for CUDA graphs on a CPU: what is captured is computed again at every replay.

Or is not, as it must be noticed; and a driver whose captures fail as torch 2.13's do.
"""

from contextlib import contextmanager

import torch


class FakeReplay:
    """Computes from the captured tensors again, into the output that was captured."""

    def __init__(self, run):
        self._run = run
        self.output = run()
        self.replays = 0
        self.is_reset = False

    def replay(self):
        assert not self.is_reset
        self.replays += 1
        self.output.copy_(self._run())

    def reset(self):
        self.is_reset = True


class FakeCapture:
    def __init__(self, failures=0):
        self.made = []
        self.failures = failures

    def __call__(self, run):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("operation not permitted when stream is capturing")
        self.made.append(FakeReplay(run))
        return self.made[-1]


class Frozen(FakeReplay):
    """A graph with nothing in it."""

    def replay(self):
        self.replays += 1


class Constant(FakeReplay):
    def replay(self):
        self.replays += 1
        self.output.zero_()


class NotANumber(FakeReplay):
    def replay(self):
        self.replays += 1
        self.output.fill_(torch.nan)


class Repeating(FakeReplay):
    """Gives what its first replay gave."""

    first = None

    def replay(self):
        super().replay()
        if self.first is None:
            self.first = self.output.clone()
        self.output.copy_(self.first)


class Lucky(FakeReplay):
    """Writes nothing, into memory that holds what is right unless it was filled before."""

    def replay(self):
        was_filled = bool(self.output.isnan().all())
        super().replay()
        if was_filled:
            self.output.fill_(torch.nan)


NOT_REPLAYING = {
    "empty": Frozen,
    "zeros": Constant,
    "NaN": NotANumber,
    "repeats itself": Repeating,
    "nothing but memory": Lucky,
}
INPUTS = ("img", "txt", "mod", "cos", "sin")


class Baking:
    """A step and a ``Capture`` of it that keeps the first value of one input, as a graph can."""

    def __init__(self, step, baked):
        self._step = step
        self._baked = baked
        self._seen = None

    def step(self, img, txt, mod, context):
        given = (img, txt, mod, *context.rope)
        self._seen = given[INPUTS.index(self._baked)]
        return self._step(img, txt, mod, context)

    def capture(self, run):
        baking = self

        class Baked(FakeReplay):
            def __init__(self, run):
                super().__init__(run)
                self._buffer = baking._seen
                self._value = self._buffer.clone()

            def replay(self):
                self._buffer.copy_(self._value)
                super().replay()

        return Baked(run)


class FakeDriver:
    """What ``CudaCapture`` asks of ``torch.cuda``, with one current stream and counted pools.

    ``fails_at`` is where the next capture fails: ``begin``, ``run`` (which spoils the capture),
    ``end`` or ``instantiate``, as in torch's ``CUDAGraph.cpp``.
    """

    def __init__(self, monkeypatch):
        self.current = self.main = _Stream("main", self)
        self.recording = set()
        self.used = {}
        self.fails_at = None
        self.is_spoilt = False
        self.pools = 0
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda device: _Stream("side", self))
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(cuda, "stream", self.on_stream)
        monkeypatch.setattr(cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(cuda, "graph_pool_handle", self.new_pool)
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: _Graph(self))
        end, release = "_cuda_endAllocateToPool", "_cuda_releasePool"
        monkeypatch.setattr(torch._C, end, self.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, release, self.release, raising=False)

    @contextmanager
    def on_stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def new_pool(self):
        self.pools += 1
        return (0, self.pools)

    def empty_cache(self):
        assert not self.recording
        self.used = {pool: count for pool, count in self.used.items() if count}

    def end_allocate(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device, pool):
        assert self.used[pool] > 0, "freed twice: other graphs' memory is gone"
        self.used[pool] -= 1

    def fail(self, place):
        if self.fails_at == place:
            self.fails_at = None
            raise torch.AcceleratorError("operation failed due to a previous error during capture")


class _Stream:
    device_index = 0

    def __init__(self, name, driver):
        self.name, self._driver, self.waits = name, driver, []

    def wait_stream(self, other):
        self.waits.append(other.name)

    def synchronize(self):
        assert not self._driver.recording


class _Graph:
    def __init__(self, driver):
        self._driver, self._pool, self._has_ended, self._is_capturing = driver, None, False, False

    def capture_begin(self, pool, capture_error_mode):
        driver = self._driver
        assert driver.current.name == "side"
        assert capture_error_mode == "thread_local"
        assert driver.used.get(pool, 1) > 0, "a pool whose last graph is gone"
        driver.used[pool] = driver.used.get(pool, 0) + 1
        if pool in driver.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        driver.recording.add(pool)
        self._pool = pool
        driver.fail("begin")
        self._is_capturing = True

    def capture_end(self):
        driver, was_capturing = self._driver, self._is_capturing
        assert driver.current.name == "side"
        self._is_capturing = False
        if not was_capturing:
            raise torch.AcceleratorError("operation not permitted")
        if driver.is_spoilt:
            driver.is_spoilt = False
            raise torch.AcceleratorError("capture was invalidated")
        driver.fail("end")
        driver.end_allocate(0, self._pool)
        self._has_ended = True
        driver.fail("instantiate")

    def pool(self):
        if not self._has_ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def replay(self):
        assert self._has_ended

    def reset(self):
        if self._has_ended:
            self._driver.release(0, self._pool)
        self._has_ended = False
