"""docker-compose.yml brought up under a name and on ports of a test's own, and how to ask what runs there."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtest.bench.bench_target import free_port
from tests.containers.engine import Engine, finished

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0
START_S = 500.0  # an engine on a busy machine
QUESTION = "What is the capital of France?"
PORTS = ("EVENHAND_PORT", "EVENHAND_ADMIN_PORT", "EVENHAND_PROMETHEUS_PORT", "EVENHAND_GRAFANA_PORT")
DOCUMENTED_KEY = 'echo "EVENHAND_ADMIN_KEY=$(openssl rand -hex 24)" > .env'


@dataclass
class Site:
    """A project of Docker Compose. folder: where its `.env` is. files: added to docker-compose.yml."""

    engine: Engine
    compose_program: str
    name: str
    folder: Path
    files: list[Path] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in PORTS})

    def __post_init__(self) -> None:
        assert DOCUMENTED_KEY in (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
        self.new_admin_key()

    def new_admin_key(self) -> None:
        """Makes `.env` as the documentation says."""
        subprocess.run(["sh", "-c", DOCUMENTED_KEY], cwd=self.folder, check=True)

    @property
    def admin_key(self) -> str:
        return (self.folder / ".env").read_text().strip().partition("=")[2]

    def compose(self, *words: str, check: bool = True, limit_s: float = START_S) -> subprocess.CompletedProcess[str]:
        project = [
            "--project-directory",
            str(ROOT),
            "--project-name",
            self.name,
            "--env-file",
            str(self.folder / ".env"),
        ]
        files = [word for file in (ROOT / "docker-compose.yml", *self.files) for word in ("--file", str(file))]
        environ = {**self.engine.environ, **{name: str(port) for name, port in self.ports.items()}}
        return finished([self.compose_program, *project, *files, *words], environ, check, limit_s)

    def up(self, *words: str) -> None:
        """Starts services and waits until they are healthy."""
        self.compose("up", "--no-build", "--detach", "--wait", "--wait-timeout", str(int(START_S)), *words)

    def containers(self, service: str = "", *, every: bool = False) -> list[str]:
        """Ids of the containers that run, or of every one; of one service, or of all."""
        named = f"label=com.docker.compose.service={service}" if service else ""
        filters = [f"label=com.docker.compose.project={self.name}", *filter(None, [named])]
        words = [word for one in filters for word in ("--filter", one)]
        return self.engine.said("ps", "--quiet", *(["--all"] if every else []), *words).split()

    def inside(self, service: str, *command: str) -> str:
        """What a command says in the first container of a service."""
        return self.engine.said("exec", self.containers(service)[0], *command)

    def inspect(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(self.engine.said("inspect", container))
        return dict(found)

    def left(self) -> dict[str, list[str]]:
        """What there is of this project: containers, volumes and networks."""
        own = ("--quiet", "--filter", f"label=com.docker.compose.project={self.name}")
        return {
            "containers": self.engine.said("ps", "--all", *own).split(),
            "volumes": self.engine.said("volume", "ls", *own).split(),
            "networks": self.engine.said("network", "ls", *own).split(),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['EVENHAND_PORT']}"

    def admin(self, path: str) -> httpx2.Response:
        url = f"http://127.0.0.1:{self.ports['EVENHAND_ADMIN_PORT']}{path}"
        return httpx2.get(url, headers={"authorization": f"Bearer {self.admin_key}"}, timeout=LIMIT_S)

    def prometheus(self, path: str) -> Any:
        url = f"http://127.0.0.1:{self.ports['EVENHAND_PROMETHEUS_PORT']}/api/v1/{path}"
        return httpx2.get(url, timeout=LIMIT_S).json()["data"]

    def metric(self, name: str) -> float:
        """The sum of a gateway's metric over its labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=LIMIT_S).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def ask(self, question: str = QUESTION, **fields: Any) -> httpx2.Response:
        """One chat, the likeliest answer."""
        body = {"model": "smollm2", "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, timeout=LIMIT_S)

    def answer(self, question: str = QUESTION, **fields: Any) -> str:
        reply = self.ask(question, **fields)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])

    @contextmanager
    def stream(self, prompt: str, tokens: int) -> Iterator["Stream"]:
        """A streamed completion of so many tokens that has begun."""
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        body |= {"stream": True}
        with httpx2.stream("POST", f"{self.url}/v1/completions", json=body, timeout=LIMIT_S) as reply:
            assert reply.status_code == 200
            stream = Stream(reply.iter_lines())
            stream.read(3)
            yield stream


@dataclass
class Stream:
    """A stream of completion events: `text` is what has come, `done` whether its end has."""

    lines: Iterator[str]
    text: str = ""
    done: bool = False

    def read(self, events: int = 10**9) -> "Stream":
        """Takes so many events, or all that come until the end."""
        while events and not self.done:
            line = next(self.lines, None)
            assert line is not None, f"the stream ended without its end, after {self.text!r}"
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                self.done = True
            else:
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                self.text += "".join(choice["text"] for choice in event["choices"])
                events -= 1
        return self


def ready_workers(site: Site) -> int:
    """Workers that the gateway has found and tested, which takes it seconds after they are healthy."""
    return sum(worker["state"] == "ready" for worker in site.admin("/admin/workers").json()["workers"])


def until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"after {limit_s:.0f} s still not: {what}"
        time.sleep(0.2)  # between two looks at another process, not a wait for luck
