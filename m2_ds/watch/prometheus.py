"""The newest numbers of each run as Prometheus reads them."""

from collections.abc import Iterator

from m2_ds.watch.numbers import recalls
from m2_ds.watch.run import State, WatchedRun

STATES: tuple[State, ...] = ("waiting", "running", "quiet", "ended", "finished", "gone")
# Field of the log, name without m2_, what it is.
GAUGES = {
    "loss": ("loss", "The objective, mean of the newest line's steps"),
    "lr": ("learning_rate", "Learning rate of the last step"),
    "grad_norm": ("gradient_norm", "Norm of the whole gradient before clipping"),
    "samples_per_s": ("samples_per_second", "Pairs a second over all ranks"),
    "step_s": ("step_seconds", "Seconds a step"),
    "tflops": ("tflops", "Achieved TFLOP/s of one rank"),
    "mfu": ("mfu_ratio", "Achieved arithmetic as a share of the device's peak"),
    "data_wait_share": ("data_wait_ratio", "Share of the step that the first rank waited for its batch"),
    "communication_share": ("communication_ratio", "Share of the step in which collectives held the first rank up"),
    "bubble_share": ("bubble_ratio", "Share of both passes in which pipeline stages waited for each other"),
    "memory_gb": ("memory_gigabytes", "Memory of the fullest rank"),
}
# Prefix of fields, name, label, what it is.
FAMILIES = (
    ("loss/", "loss_part", "part", "Parts of the loss: levels, languages, masked objectives"),
    ("logit_scale/", "logit_scale", "level", "exp(logit scale)"),
    ("cmlm_accuracy/", "hidden_words_told_ratio", "language", "Share of hidden tokens told right, while training"),
    ("seconds/", "phase_seconds", "phase", "Seconds a step by phase, first rank"),
    ("epochs/", "epochs", "source", "How often each source's rows have been seen"),
)


def exposition(runs: list[WatchedRun], now: float) -> tuple[str, bytes]:
    """(content type, text). Raises ValueError where prometheus_client is not installed."""
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
        from prometheus_client.registry import Collector
    except ImportError:
        raise ValueError("prometheus_client is not installed: pip install prometheus-client") from None

    class Runs(Collector):
        def collect(self) -> Iterator[Metric]:
            def gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
                return GaugeMetricFamily(f"m2_{name}", about, labels=["run", *labels])

            steps, age = (
                gauge("steps_goal", "Steps of the whole run"),
                gauge("age_seconds", "Since the last sign of life"),
            )
            state = gauge("state", "1 for the state that the run is in", "state")
            evaluation = gauge("evaluation_percent", "Newest evaluation: mean recall or accuracy", "of")
            saved = gauge("checkpoint_step", "Step of the newest checkpoint")
            done = CounterMetricFamily("m2_steps", "Optimizer steps done", labels=["run"])
            seen = CounterMetricFamily("m2_samples", "Pairs seen", labels=["run"])
            skipped = CounterMetricFamily("m2_skipped_pairs", "Pairs replaced, by reason", labels=["run", "reason"])
            other = CounterMetricFamily("m2_other_language_pairs", "Pairs told in another language", labels=["run"])
            events = CounterMetricFamily("m2_events", "Anomalies and restarts", labels=["run", "kind"])
            for run in runs:
                standing, last = run.standing(now), run.lines.last
                done.add_metric([run.name], standing.step)
                seen.add_metric([run.name], last("samples") or 0)
                if standing.steps is not None:
                    steps.add_metric([run.name], standing.steps)
                if standing.age_s is not None:
                    age.add_metric([run.name], standing.age_s)
                if run.checkpoint is not None:
                    saved.add_metric([run.name], run.checkpoint[0])
                for each in STATES:
                    state.add_metric([run.name, each], float(each == standing.state))
                for name in run.lines.names("skipped/"):
                    skipped.add_metric([run.name, name.removeprefix("skipped/")], last(name) or 0)
                other.add_metric([run.name], last("other_language") or 0)
                for kind in ("anomalies", "restarts"):
                    events.add_metric([run.name, kind], sum(event.kind == kind for event in run.events))
                newest = next(reversed(run.evaluations.values()), {})
                for name, found in recalls(newest).items():
                    evaluation.add_metric([run.name, name], found)
            yield from (steps, age, state, evaluation, saved, done, seen, skipped, other, events)
            for field, (name, about) in GAUGES.items():
                family = gauge(name, about)
                for run in runs:
                    if (value := run.lines.last(field)) is not None:
                        family.add_metric([run.name], value)
                yield family
            for prefix, name, label, about in FAMILIES:
                family = gauge(name, about, label)
                for run in runs:
                    for field in run.lines.names(prefix):
                        if (value := run.lines.last(field)) is not None:
                            family.add_metric([run.name, field.removeprefix(prefix)], value)
                yield family

    registry = CollectorRegistry()
    registry.register(Runs())
    return CONTENT_TYPE_LATEST, generate_latest(registry)
