"""Progress of long work, for a terminal or for a log. Stages say what they do; how it looks is decided here."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Task(Protocol):
    def advance(self, steps: int = 1, **counts: float) -> None:
        """`steps` done; `counts` are further totals shown as rates, such as tokens=312."""
        ...

    def note(self, text: str) -> None: ...


class Progress(Protocol):
    def task(self, description: str, total: int | None) -> Any:
        """A context manager yielding a `Task`."""
        ...


class LogTask:
    """Says where it stands at most every `interval` seconds, and once at the end."""

    def __init__(self, log: logging.Logger, description: str, total: int | None, interval: float) -> None:
        self._log = log
        self._description = description
        self._total = total
        self._interval = interval
        self._done = 0
        self._counts: dict[str, float] = {}
        self._started = self._last = time.monotonic()

    def advance(self, steps: int = 1, **counts: float) -> None:
        self._done += steps
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        if time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            self._say()

    def note(self, text: str) -> None:
        self._log.info("%s: %s", self._description, text)

    def close(self) -> None:
        self._say()

    def _say(self) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        rates = "".join(f", {value / elapsed:,.0f} {name}/s" for name, value in self._counts.items())
        total = f"/{self._total}" if self._total is not None else ""
        self._log.info("%s: %d%s in %.1f s%s", self._description, self._done, total, elapsed, rates)


class LogProgress:
    """For runs without a terminal: one line now and then in the run's log."""

    def __init__(self, log: logging.Logger | None = None, interval: float = 10.0) -> None:
        self._log = log or logging.getLogger("trait_assets")
        self._interval = interval

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[LogTask]:
        task = LogTask(self._log, description, total, self._interval)
        try:
            yield task
        finally:
            task.close()


class LinesProgress(LogProgress):
    """The same lines on stderr, for a command whose output is not a terminal."""

    def __init__(self) -> None:
        log = logging.getLogger("trait_assets.progress")
        if not log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            log.addHandler(handler)
            log.propagate = False
            log.setLevel(logging.INFO)
        super().__init__(log)


class RichTask:
    def __init__(self, bar: Any, task_id: Any) -> None:
        self._bar = bar
        self._id = task_id
        self._counts: dict[str, float] = {}
        self._note = ""
        self._started = time.monotonic()

    def advance(self, steps: int = 1, **counts: float) -> None:
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        elapsed = max(time.monotonic() - self._started, 1e-6)
        rates = [f"{value / elapsed:,.0f} {name}/s" for name, value in self._counts.items()]
        self._bar.update(self._id, advance=steps, rates="  ".join([*rates, self._note]).strip())

    def note(self, text: str) -> None:
        self._note = text
        self.advance(0)


class RichProgress:
    """Bars on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[RichTask]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rates]}"),
            console=self._console,
        ) as bar:
            yield RichTask(bar, bar.add_task(description, total=total, rates=""))
