"""What Prometheus scrapes from `ridgeline serve`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one server.

    Attributes:
        requests: Number of requests to predict, by model, version and HTTP status; the version is empty if no version
            answered, and the model if there is none of the name.
        seconds: Their duration, by model, the body included.
        batch_images: Number of images in each batch, by model.
        served: The version that is served, by model and label.
        share: The share of the requests that the canary answers, by model; 0 without one.
        loads: Number of loaded versions, by model and outcome (``loaded``, ``failed``).
        problem: 1 while the registry's version can't be served, else 0, by model.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ridgeline_requests", "Requests to predict.", ["model", "version", "status"], registry=registry
        )
        self.seconds = Histogram(
            "ridgeline_request_seconds", "Duration of a request.", ["model"], buckets=SECONDS, registry=registry
        )
        self.batch_images = Histogram(
            "ridgeline_batch_images", "Images in a batch.", ["model"], buckets=IMAGES, registry=registry
        )
        self.served = Gauge("ridgeline_served_version", "Served version.", ["model", "label"], registry=registry)
        self.share = Gauge("ridgeline_canary_share", "Share of the canary.", ["model"], registry=registry)
        self.loads = Counter("ridgeline_loads", "Loaded versions.", ["model", "outcome"], registry=registry)
        self.problem = Gauge(
            "ridgeline_problem", "1 while the registry's version can't be served.", ["model"], registry=registry
        )

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)
