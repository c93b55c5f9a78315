"""What the runner shows on a terminal: how many cells are done, what every worker does, the time left, the last failure."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lofit_lens.experiments.executors.groups import Group
from lofit_lens.experiments.store.cells import Cell

log = logging.getLogger(__name__)
NEWS = 30.0  # seconds between two lines on what runs, where there is no terminal
OTHER_LINES = 6  # of the terminal's height: bar, counts, "more", failure, note, cursor


class Tally:
    """How a run of a grid stands.

    Args:
        cells: by name.
        there: names of those that were done before.
        slots: groups of cells at a time.
        clock: seconds.
    """

    def __init__(
        self,
        cells: Mapping[str, Cell],
        there: Collection[str],
        slots: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cells, self.slots, self.clock = cells, slots, clock
        self.before, self.done = len(there), len(there)
        self.open = dict.fromkeys(name for name in cells if name not in there)
        self.running: dict[Group, tuple[int, float]] = {}  # place among the workers, begun at
        self.failed: dict[str, str] = {}
        self.blocked: set[str] = set()
        self.spent = (0.0, 0.0)  # seconds and cost of the cells computed so far
        self.start, self.note, self.ended = clock(), "", False

    def begin(self, group: Group) -> None:
        """A group was handed out."""
        taken = {place for place, _ in self.running.values()}
        self.running[group] = (next(i for i in range(len(taken) + 1) if i not in taken), self.clock())
        log.info("begun: %s", group.label)

    def end(self, group: Group) -> None:
        """A group came back, whatever became of it."""
        self.running.pop(group, None)

    def finish(self, name: str, seconds: float | None) -> None:
        """A cell is done, after so many seconds; None where another runner computed it."""
        self.done += 1
        self.open.pop(name, None)
        if seconds is not None:
            self.spent = (self.spent[0] + seconds, self.spent[1] + self.cells[name].cost)

    def fail(self, name: str, error: str, blocked: set[str]) -> None:
        """A cell failed for good; `blocked` are all cells that cannot begin by now."""
        self.failed[name] = error
        self.blocked = blocked
        for gone in (name, *blocked):
            self.open.pop(gone, None)

    @property
    def news(self) -> str:
        """One line on what runs, for how long, and the time left."""
        begun = dict(self.running).items()
        running = ", ".join(f"{group.label} ({_clock_time(self.clock() - since)})" for group, (_, since) in begun)
        return f"[{self.done}/{len(self.cells)}] running: {running or 'nothing'}; {_time(self)}"

    @property
    def counts(self) -> str:
        """One sentence for messages."""
        more = "".join(f", {len(n)} {what}" for n, what in ((self.failed, "failed"), (self.blocked, "blocked")) if n)
        return f"{self.done} of {len(self.cells)} cells are done{more}"

    def seconds_left(self) -> float | None:
        """From the seconds that one unit of cost has taken so far; None as long as nothing was computed."""
        seconds, cost = self.spent
        if not cost:
            return None
        now, running, open_ = self.clock(), dict(self.running), list(self.open)
        begun = {cell.name: group for group in running for cell in group.cells}
        parts = dict.fromkeys(
            (begun.get(name, name) for name in open_), 0.0
        )  # cost of each group that runs, and of each other cell
        for name in open_:
            parts[begun.get(name, name)] += self.cells[name].cost
        left = [
            max(0.0, part * seconds / cost - (now - running[what][1] if isinstance(what, Group) else 0.0))
            for what, part in parts.items()
        ]
        return max(sum(left) / self.slots, max(left, default=0.0))


def view(tally: Tally, height: int = 24) -> RenderableType:
    """The table as it stands: a bar, counts, a line a worker, the last failure.

    Args:
        tally: of the run.
        height: lines of the terminal; workers beyond it are counted only.
    """
    running, failed = dict(tally.running), dict(tally.failed)
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    n = len(tally.cells)
    bar.add_row(ProgressBar(max(n, 1), tally.done if n else 1), f"{tally.done}/{n}")
    begun = sum(cell.name in tally.open for group in running for cell in group.cells)
    waiting = max(0, len(tally.open) - begun)
    words = [(f"{tally.done} done", "green")]
    words += [(f"{begun} running", "cyan"), (f"{waiting} waiting", "")] if not tally.ended else []
    words += [(f"{len(failed)} failed", "bold red")] if failed else []
    words += [(f"{len(tally.blocked)} blocked", "red")] if tally.blocked else []
    words += [(_time(tally), "dim")]
    parts: list[RenderableType] = [bar, Text("  ").join(Text(text, style) for text, style in words)]
    if not tally.ended:
        parts.append(_workers(tally, running, max(1, height - OTHER_LINES)))
    if failed:
        name, error = list(failed.items())[-1]
        parts.append(_line(f"last failure: {tally.cells[name].label}: {' '.join(error.split())}", "red"))
    if not tally.ended:  # a short line at the end: the terminal's own "^C" then stays on it and is wiped with it
        parts.append(_line(tally.note or "Ctrl-C stops; what is done stays done", "yellow" if tally.note else "dim"))
    return Lines(*parts)


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _time(tally: Tally) -> str:
    if tally.ended:
        return f"in {duration(tally.clock() - tally.start)}"
    left = tally.seconds_left()
    return "time left: not known yet" if left is None else f"about {duration(left)} left"


def _workers(tally: Tally, running: dict[Group, tuple[int, float]], lines: int) -> Table:
    """One line for every place, idle ones too, so that the table keeps its height."""
    by_place = {place: (group, since) for group, (place, since) in running.items()}
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right", style="dim")
    table.add_column(justify="right", min_width=5, style="cyan", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for place in range(min(tally.slots, lines)):
        if place in by_place:
            group, since = by_place[place]
            table.add_row(f"{place + 1}", _clock_time(tally.clock() - since), Text(group.label))
        else:
            table.add_row(f"{place + 1}", "", Text("idle", "dim"))
    more = sum(place >= lines for place in by_place)
    if tally.slots > lines:
        table.add_row("", "", Text(f"and {more} more", "dim"))
    return table


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


# ----------------------------------------------------------------------------------------------------- terminal


@contextlib.contextmanager
def board(tally: Tally, progress: bool, *, console: Console | None = None) -> Iterator[None]:
    """Show the tally while the block runs, its last state afterwards.

    Log records and prints of this process appear above it meanwhile. Where stderr is no terminal: log records (INFO) of what is
    begun and, every half minute, of what runs.
    """
    # The stream itself: what `sys.stderr` is may change while a cell is computed in this process.
    console = console or Console(file=sys.stderr)
    if not progress or not console.is_terminal or console.is_dumb_terminal:
        with _news(tally) if progress else contextlib.nullcontext():
            yield
        return
    live = Live(
        get_renderable=lambda: view(tally, console.height), console=console, refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
    with _log_above(console), live:
        try:
            yield
        finally:
            tally.ended = True


@contextlib.contextmanager
def _news(tally: Tally) -> Iterator[None]:
    over = threading.Event()

    def say() -> None:
        while not over.wait(NEWS):
            log.info("%s", tally.news)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _log_above(console: Console) -> Iterator[None]:
    """Log handlers that write to the terminal write above the table."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers: dict[Any, Any] = {
        handler: handler.stream
        for logger in loggers
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") in (sys.stdout, sys.stderr)
        and handler.stream.isatty()
    }  # fmt: skip
    for handler, stream in handlers.items():
        handler.setStream(FileProxy(console, stream))
    try:
        yield
    finally:
        for handler, stream in handlers.items():
            handler.setStream(stream)
