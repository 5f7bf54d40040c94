"""The plugin's metrics, and their text for Prometheus.  Pure.  Source: Prometheus, exposition formats."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds of the histogram's buckets, in seconds.  After the last one a runtime stops waiting.
BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 2.0)
_CREATE = "chandler_nri_create_seconds"


class Metrics:
    """The counters and gauges of one process."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {"granted": 0, "nothing": 0, "refused": 0}
        self.refusals: dict[tuple[str, str], int] = {}
        self.reloads: dict[str, int] = {"done": 0, "failed": 0}
        self.unadjusted = 0
        self.connections = 0
        self.connected = False
        self.grants = 0
        self.leases = 0
        self.holds = 0
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def created(self, result: str, seconds: float, kind: str = "", rule: str = "") -> None:
        """Counts one CreateContainer.

        `result`: granted, nothing or refused.  `kind`: the class of the error that refused it, '' for none.  `rule`:
        the part of the policy that refused it, '' for none.
        """
        self.requests[result] += 1
        if kind:
            self.refusals[kind, rule] = self.refusals.get((kind, rule), 0) + 1
        self._buckets[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def text(self) -> str:
        """All metrics, in the text format."""
        lines: list[str] = []
        _family(
            lines,
            "chandler_nri_requests_total",
            "counter",
            "containers created, by what became of their request",
            "result",
            self.requests,
        )
        _head(
            lines,
            "chandler_nri_refusals_total",
            "counter",
            "containers refused, by kind of error and rule of the policy",
        )
        lines += [
            f'chandler_nri_refusals_total{{kind="{kind}",rule="{_label(rule)}"}} {count}'
            for (kind, rule), count in sorted(self.refusals.items())
        ]
        _family(
            lines,
            "chandler_nri_reloads_total",
            "counter",
            "reloads of configuration and inventory",
            "result",
            self.reloads,
        )
        _single(
            lines,
            "chandler_nri_unadjusted_total",
            "counter",
            "running containers that asked and have no grant",
            self.unadjusted,
        )
        _single(lines, "chandler_nri_connections_total", "counter", "connections to the runtime", self.connections)
        _single(lines, "chandler_nri_connected", "gauge", "1 while the runtime has us", int(self.connected))
        _single(lines, "chandler_nri_grants", "gauge", "grants that containers hold", self.grants)
        _single(
            lines, "chandler_nri_leases", "gauge", "leases of devices that containers hold through NRI", self.leases
        )
        _single(
            lines,
            "chandler_nri_holds",
            "gauge",
            "refused containers for which devices are made ready until they are tried again",
            self.holds,
        )
        _head(lines, _CREATE, "histogram", "time in CreateContainer")
        total = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._buckets):
            total += count
            lines.append(f'{_CREATE}_bucket{{le="{bound}"}} {total}')
        lines += (f"{_CREATE}_sum {self._seconds:.6f}", f"{_CREATE}_count {total}")
        return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    """A label's value, escaped."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _head(lines: list[str], name: str, kind: str, text: str) -> None:
    lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")


def _single(lines: list[str], name: str, kind: str, text: str, value: int) -> None:
    _head(lines, name, kind, text)
    lines.append(f"{name} {value}")


def _family(lines: list[str], name: str, kind: str, text: str, label: str, values: dict[str, int]) -> None:
    _head(lines, name, kind, text)
    lines += [f'{name}{{{label}="{key}"}} {value}' for key, value in sorted(values.items())]
