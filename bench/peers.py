"""Metrics clients that count in memory, as their documentation says to use them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import prometheus_client
from datadog.dogstatsd.base import DogStatsd

if TYPE_CHECKING:
    from collections.abc import Callable


def peers() -> dict[str, Callable[[str], object]]:
    views = prometheus_client.Counter("views", "Page views", ["page"], registry=prometheus_client.CollectorRegistry())
    statsd = DogStatsd(host="127.0.0.1", port=_unused_port(), disable_aggregation=False, disable_telemetry=True)
    return {
        "prometheus_client, labels(key).inc()": lambda key: views.labels(key).inc(),
        "datadog, aggregated increment": lambda key: statsd.increment("views", tags=[key]),
    }


def _unused_port() -> int:
    """Packets are sent as in life, and nobody listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
