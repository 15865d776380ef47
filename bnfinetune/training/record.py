"""What a run has found out: it goes into every state, and the report tells it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.training.measuring.metrics import Metrics, restored_metrics


@dataclass
class Record:
    """What is known of a run so far.

    Attributes:
        statistics: Where the running statistics come from, with the fingerprint of the data.
        unreadable: Images that `data.on_error=skip` has left out, with the reason.
        before: Metrics by split of the network as it started.
        history: One entry per evaluation.
        average: Of the average at the end: the updates that it is of, its metrics, and whether it is the best.
    """

    statistics: dict[str, Any]
    unreadable: dict[str, None] = field(default_factory=dict)
    before: dict[str, Metrics] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, Any] = field(default_factory=dict)

    def best_of(self, update: int) -> str:
        """The best network in words, where `update` is that of the best evaluation."""
        if not self.average.get("best"):
            return f"update {update}"
        return f"updates {', '.join(map(str, self.average['of']))}, averaged"

    def note_recalibration(self, reports: Iterable[PreciseBNReport], data: str, moment: str) -> None:
        """Write down that statistics were computed anew, from `data`."""
        for report in reports:
            self.statistics.update(
                computed="precise-BN", images=report.samples, data=data, at=moment, share=report.share
            )

    def state(self) -> dict[str, Any]:
        """What a training state holds of it."""
        before = {name: asdict(metrics) for name, metrics in self.before.items()}
        return {"history": self.history, "before": before, "source": self.statistics}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Go back to what `state` returned; the fingerprint stays that of the data as it is."""
        self.history[:] = saved["history"]
        self.statistics = {**saved["source"], "fingerprint": self.statistics["fingerprint"]}
        self.before = {name: restored_metrics(values) for name, values in saved["before"].items()}
