"""A Dockerfile's stages and instructions, as far as the tests need them."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """base: an image, or an earlier stage. steps: (instruction, its text), in order."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    def copied(self) -> list[tuple[list[str], str]]:
        """(sources, destination) of each COPY from the build context."""
        words = [shlex.split(text) for text in self.of("COPY") if not text.startswith("--from")]
        return [(parts[:-1], parts[-1]) for parts in words]


def stages(path: Path) -> dict[str, Stage]:
    """All stages by name."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: dict[str, Stage] = {}
    for line in filter(None, text.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = Stage(stage, base)
        elif found:
            found[stage].steps.append((name, rest))
    return found
