"""How far is a long piece of work? A bar with the speed and the time left; in a log file, a line now and then."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class WorkBar:
    """Count `unit`, such as images, on stderr: "encoding" is what is `doing`, "encoded" what is `done`.

    `begun` of `total` were there before, which tells the speed. Where standard error is no terminal, a line comes at
    most every `seconds_a_line`, and one at the end.
    """

    def __init__(
        self,
        total: int,
        begun: int = 0,
        *,
        doing: str,
        done: str,
        unit: str = "images",
        seconds_a_line: float = 20.0,
    ) -> None:
        self.total, self.count, self.seconds_a_line = total, float(begun), seconds_a_line
        self._doing, self._done, self._unit = doing, done, unit
        self._first, self._started = begun, time.monotonic()
        self._printed = self._started
        self._bar = Progress(
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(doing, total=total, completed=begun, speed="")

    def __enter__(self) -> "WorkBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, number: float) -> None:
        """Count `number` more."""
        self.show(self.count + number)

    def show(self, count: float) -> None:
        """Show that `count` of the total are done; a part of one may be."""
        ended = count >= self.total > self.count
        self.count = count
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        a_second = (count - self._first) / seconds
        speed = f"{a_second:,.{0 if a_second >= 10 else 2}f} {self._unit}/s"
        self._bar.update(self._task, completed=count, speed=speed)
        if self._bar.disable and (now - self._printed >= self.seconds_a_line or ended):
            self._printed = now
            left = timedelta(seconds=round((self.total - count) / max(a_second, 1e-9)))
            line = f"{self._done} {int(count)}/{self.total} {self._unit}  {speed}"
            print(line if ended else f"{line}  {left} left", file=sys.stderr, flush=True)
