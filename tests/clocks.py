"""A clock that only tests move, so that no test passes or fails by how fast the machine is."""

HANG_SECONDS = 1800
"""How long a test waits for what cannot fail to come. It decides nothing but when a run that hangs is ended."""


class Clock:
    """Stands in for ``time.monotonic``: it stands still, but for ``pace`` seconds at each look and what is added."""

    def __init__(self, pace: float = 0.0) -> None:
        self.now, self.pace = 1000.0, pace

    def __call__(self) -> float:
        self.now += self.pace
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
