"""The engine of API nodes whose workers look into the database by themselves."""


class PollingEngine:
    """Does nothing: what is accepted is found within half a second."""

    async def start(self) -> None:
        """There is nothing to start."""

    async def stop(self) -> None:
        """There is nothing to stop; the workers are not ours."""

    def wake(self) -> None:
        """Nobody can be told."""
