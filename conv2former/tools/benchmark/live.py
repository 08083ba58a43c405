"""Shows and saves a measurement while it runs: rows as they come, and files that say that they are incomplete."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...errors import OutputError
from .models import Known, Watcher
from .networks import Network
from .progress import Forecast, Progress, duration
from .report import FORMAT_NAMES, check_outputs, save_outputs
from .results import Group, Plan, Report, Result

__all__ = ["LiveOutput", "View"]

SAVE_SECONDS = 10.0  # at least, between two savings within a group: the disk is no part of what is timed
LONG_SECONDS = 5.0  # what is left of a group for which preliminary figures are worth their lines


@dataclass(frozen=True)
class View:
    """How results are shown.

    Attributes:
        name: of the section of a Markdown page.
        head, foot: what is printed before and after the groups.
        group: the text of one group.
        group_is_result: whether the groups' texts are the results, or rows that the foot has again.
        markdown: the section.
        figure: the chart.
    """

    name: str
    head: Callable[[Report], str]
    group: Callable[[Report, Group], str]
    foot: Callable[[Report], str]
    markdown: Callable[[Report, Path | None], str]
    figure: Callable[[Report], Figure]
    group_is_result: bool = True


@dataclass
class Outputs:
    """The files that the user asked for."""

    json_file: Path | None = None
    chart: Path | None = None
    markdown: Path | None = None

    def check(self) -> None:
        """Checks that all can be written.

        Raises:
            OutputError: one cannot.
        """
        check_outputs(self.json_file, self.chart, self.markdown)

    def save(self, view: View, report: Report, with_chart: bool = True) -> None:
        """Writes all results that there are.

        Raises:
            OutputError: one cannot be written.
        """
        chart = self.chart if with_chart else None
        text = view.markdown(report, self.chart)
        save_outputs(report, view.name, text, lambda: view.figure(report), self.json_file, chart, self.markdown)


@dataclass
class LiveOutput(Watcher):
    """Prints results to standard output as they become final, the rest to standard error, and saves all as it comes.

    Args:
        plan: what is measured.
        view: how it is shown.
        outputs: where it is saved.
        progress: how far it is.
    """

    plan: Plan
    view: View
    outputs: Outputs
    progress: Progress

    def __post_init__(self) -> None:
        self._forecast: Forecast | None = None
        self._report: Any = None
        self._last_saved = time.monotonic()
        self._done = 0
        self.progress.say(f"{self.plan.describe()}; how long it takes is said when the first network has run")

    def started(self, report: Report) -> None:
        self._report = report
        self.progress.print(self.view.head(report))

    def counting(self, network: Network) -> None:
        self.progress.at(f"counting the arithmetic of {network.label}")

    def counted(self, known: Known) -> None:
        def macs(result: Result) -> float | None:
            fact = known[result.network, result.setting.height, result.setting.width]
            result.macs = None if isinstance(fact, str) else fact[1]
            return result.step_macs

        self._forecast = Forecast(self.plan, macs)

    def preparing(self, group: Group, result: Result) -> None:
        place = 1 + group.results.index(result)
        self.progress.at(f"preparing {_where(group)}: {_variant(result)} ({place} of {len(group.results)})")

    def prepared(self, group: Group, result: Result, seconds: float) -> None:
        assert self._forecast is not None
        first = self._forecast.left() is None
        self._forecast.prepared(result, seconds)
        left = self._forecast.left()
        if first and left is not None:
            self.progress.say(f"about {duration(left)} to go, judged by the first network alone")
        self.progress.say(f"{_where(group)}: {_variant(result)}: {_first_figures(result)}")
        self.progress.at(f"preparing {_where(group)}", left)
        self._save_now_and_then()

    def timing(self, group: Group, result: Result | None, number: int) -> None:
        what = _variant(result) if result else "the machine's own speed"
        assert self._forecast is not None
        for other in group.results:
            self._forecast.timed(other)
        self.progress.at(
            f"timing {_where(group)}: round {number + 1} of {self.plan.rounds}, {what}", self._forecast.left()
        )

    def round_ended(self, group: Group, number: int) -> None:
        left = self.progress.left
        if number == 0 and self.plan.rounds > 1 and left is not None and left > LONG_SECONDS:
            title = f"preliminary, after round 1 of {self.plan.rounds}:"
            self.progress.say(f"\n{title}\n{self.view.group(self._report, group)}\n")
        self._save_now_and_then()

    def group_ended(self, group: Group) -> None:
        self._done += 1
        text = self.view.group(self._report, group)
        if self.view.group_is_result:
            self.progress.print(f"\n{text}")
        else:
            self.progress.say(text)
        self._save(with_chart=True)

    def finish(self, report: Report) -> None:
        """Shows and saves what there is at the end.

        Raises:
            OutputError: a file cannot be written.
        """
        if self.view.group_is_result:
            for group in report.groups[self._done :]:  # one that was interrupted
                self.progress.print(f"\n{self.view.group(report, group)}")
        self.progress.print(self.view.foot(report))
        self.outputs.save(self.view, report)

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self._last_saved >= SAVE_SECONDS:
            self._save(with_chart=False)

    def _save(self, with_chart: bool) -> None:
        """Saves what there is; a disk that is full now may have room at the end, which then says if it has not."""
        self._last_saved = time.monotonic()
        try:
            self.outputs.save(self.view, self._report, with_chart)
        except OutputError as e:
            self.progress.say(f"not saved for now: {e}")


# ------------------------------------------------------------------------------------------------------------ words


def _where(group: Group) -> str:
    setting = group.setting
    return f"{setting.mode} {setting.precision}, {setting.width} x {setting.height}, batch {setting.batch_size}"


def _variant(result: Result) -> str:
    execution = [] if result.setting.execution == "eager" else [result.setting.execution]
    return ", ".join([result.network, FORMAT_NAMES[result.setting.memory_format], *execution])


def _first_figures(result: Result) -> str:
    """Returns what is known of a network before it is timed in rounds."""
    if result.error:
        return f"not measured: {result.error}"
    figures = [] if result.first_seconds is None else [f"about {1000 * result.first_seconds:,.0f} ms a step"]
    if result.bytes_held_per_image is not None:
        figures.append(f"{result.bytes_held_per_image / 1e6:,.1f} MB held per image")
    return ", ".join(figures)
