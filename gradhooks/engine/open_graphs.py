"""OpenGraphs: the bytes that earlier batches hold because their outer backward has not run yet."""


class OpenGraphs:
    """The number of bytes that are held.

    Attributes:
        bytes: Bytes.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def hold(self, count: int) -> "OpenGraph":
        """Count bytes until the returned object is released, or no longer referred to."""
        return OpenGraph(self, count)


class OpenGraph:
    """Bytes that are held until a backward has run, or until the graph that refers to this object is gone."""

    _count = 0  # also if an interrupt ends the constructor

    def __init__(self, total: OpenGraphs, count: int) -> None:
        self._total = total
        self._count = count
        total.bytes += count

    def release(self) -> None:
        """Stop counting. Releasing twice does no harm."""
        if self._count:
            self._total.bytes -= self._count
            self._count = 0

    def __del__(self) -> None:
        self.release()
