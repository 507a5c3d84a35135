"""What the installer shows while a stage runs: one moving line on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

SPIN = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPIN_S = 0.1
LOG_S = 10.0
TITLE_WIDTH = 48


class ProgressLine:
    """The line of one stage, from `with` to its end. `tell` says in a few words how far it is, whenever it is shown."""

    def __init__(self, title: str, out: TextIO, clock: Callable[[], float]) -> None:
        self.tell: Callable[[], str] = lambda: ""
        self._title, self._out, self._clock = title, out, clock
        self._started_at = clock()
        self._over = threading.Event()
        self._showing = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> ProgressLine:
        self._showing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._showing.join()
        back = "\r\x1b[K" if self._out.isatty() else ""
        self._write(f"{back}  {'✗' if kind else '✓'} {self._title:<{TITLE_WIDTH}} {self._elapsed_s:6.1f} s\n")

    @property
    def _elapsed_s(self) -> float:
        return self._clock() - self._started_at

    def _show(self) -> None:
        turn = 0
        while not self._over.wait(SPIN_S if self._out.isatty() else LOG_S):
            text = f"{self._title}  {self._elapsed_s:.0f} s  {self.tell()}".rstrip()
            if self._out.isatty():
                room = shutil.get_terminal_size().columns - 5
                self._write(f"\r\x1b[K  {SPIN[turn % len(SPIN)]} {text[:room]}")
            else:
                self._write(f"    {text}\n")
            turn += 1

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class PipProgress:
    """Reads pip's output (with `--progress-bar=raw`) and says how far it is: fetching or unpacking, and how much."""

    def __init__(self, requirements: int, packages: Path) -> None:
        self._requirements, self._packages = requirements, packages
        self._seen = 0
        self._fetching, self._share = "", ""
        self._unpacking = 0
        self._present_before = self._present()

    def read(self, text: str) -> None:
        words = text.split()
        if text.startswith(("Collecting ", "Requirement already satisfied")):
            self._seen += 1
            self._fetching = ""
        elif words[:1] == ["Downloading"] and len(words) > 1:
            self._fetching, self._share = words[1].rsplit("/", 1)[-1].split("-")[0], ""
        elif words[:1] == ["Progress"] and len(words) == 4 and int(words[3]):
            self._share = f" {100 * int(words[1]) // int(words[3])} % of {int(words[3]) / 1e6:.0f} MB"
        elif text.startswith("Installing collected packages"):
            self._unpacking = text.count(",") + 1

    def tell(self) -> str:
        """pip is silent while it unpacks, so then what lies there is counted."""
        if self._unpacking:
            done = min(self._present() - self._present_before, self._unpacking)
            return f"unpacking {done} of {self._unpacking}"
        if not self._seen:
            return ""
        of = f" of {self._requirements}" if self._requirements else ""
        return f"fetching {self._seen}{of}" + (f", {self._fetching}{self._share}" if self._fetching else "")

    def _present(self) -> int:
        return sum(1 for _ in self._packages.glob("*.dist-info/INSTALLER"))
