"""Stand-ins for CUDA graphs on a CPU: what is captured is computed again at every replay."""


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
