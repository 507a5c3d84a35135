"""A gateway of several processes as a program: one port, one state, and none of them is missed."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.bench.bench_target import free_port
from tests.server.test_admin import ADMIN_KEY
from tests.server.test_processes import LIMIT_S, is_alive, until
from tests.server.test_tenants import KEY, OTHER

PROCESSES = 3
ENGINE = ["-m", "loadtest.fake.engine", "--model", "fake", "--cost", "quick"]


def call(port: int, method: str, path: str, body: object = None, key: str = KEY) -> tuple[int, bytes]:
    """One request on a connection of its own, so that the kernel chooses the process anew."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    content = None if body is None else json.dumps(body)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    try:
        return call(port, "GET", path)[0] == 200
    except OSError:
        return False


class Program:
    """A gateway of several processes, started as operators start it."""

    def __init__(self, engine_port: int, folder: Path, *options: str) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.log = folder / "log"
        command = [sys.executable, "-m", "server", "--port", str(self.port), "--gateway-processes", str(PROCESSES)]
        worker = ["--worker", f"http://127.0.0.1:{engine_port},slots=64"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EVENHAND_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *worker, *options],
                stderr=log,
                env=clean | {"EVENHAND_ADMIN_KEY": ADMIN_KEY, "EVENHAND_ADMIN_PORT": f"{self.admin_port}"},
            )
        until(lambda: self.said("with 3 processes"), "it listens")
        self.everywhere(lambda: answers(self.port, "/ready"), "it is ready")

    def said(self, text: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return text in self.log.read_text()

    def children(self) -> list[int]:
        """Process ids: the store's, if it has one, and then the gateway's."""
        pid = self.process.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def chat(self, key: str = KEY, **fields: object) -> int:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields
        return call(self.port, "POST", "/v1/chat/completions", body, key)[0]

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """What /admin says. Where its store does not answer in time it says so, and operators ask once more."""
        told: list[tuple[int, bytes]] = []

        def taken() -> bool:
            told.append(call(self.admin_port, method, f"/admin{path}", body, ADMIN_KEY))
            return told[-1][0] != 503

        until(taken, f"the store has {path}")
        status, said = told[-1]
        assert status < 300 or (status == 404 and method == "DELETE" and len(told) > 1), said
        return json.loads(said) if said else None

    def everywhere(self, sees: Callable[[], bool], what: str) -> None:
        """Waits until many connections in a row, over all processes in all likelihood, see the same."""
        until(lambda: all(sees() for _ in range(24)), what)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = call(self.port, "GET", "/metrics")[1].decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )

    def workers(self) -> set[str]:
        return {worker["id"] for worker in self.admin("GET", "/workers")["workers"]}


@pytest.fixture(scope="module")
def engine_port() -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen([sys.executable, *ENGINE, "--port", str(port)], stderr=subprocess.DEVNULL)
    until(lambda: answers(port, "/health"), "the engine answers")
    yield port
    process.terminate()
    process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def gateway(engine_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = Program(engine_port, tmp_path_factory.mktemp("gateway"))
    program.admin("PUT", "/tenants/acme", {"keys": [KEY]})
    yield program
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(LIMIT_S) == 0, program.log.read_text()


def test_all_processes_serve_and_metrics_are_those_of_all(gateway: Program) -> None:
    gateway.everywhere(lambda: gateway.chat() == 200, "the tenant is known everywhere")
    assert len(gateway.children()) == PROCESSES + 1
    until(lambda: gateway.metric("evenhand_replicas") == PROCESSES, "they know each other")
    before = gateway.metric("evenhand_requests_total")
    for _ in range(10):
        assert gateway.chat() == 200
    until(lambda: gateway.metric("evenhand_requests_total") >= before + 10, "all requests are counted")
    until(lambda: gateway.metric("evenhand_worker_up") == 1, "there is one worker")


def test_what_operators_change_reaches_every_process(gateway: Program, engine_port: int) -> None:
    gateway.admin("PUT", "/tenants/late", {"keys": [OTHER]})
    gateway.everywhere(lambda: gateway.chat(OTHER) == 200, "a new tenant is known")
    gateway.admin("DELETE", "/tenants/late")
    gateway.everywhere(lambda: gateway.chat(OTHER) == 401, "a deleted tenant is not")
    gateway.admin("PUT", "/policy", {"policy": "vtc"})
    gateway.everywhere(lambda: bool(gateway.admin("GET", "/policy")["policy"] == "vtc"), "the policy holds")
    gateway.admin("PUT", "/workers/spare", {"url": f"http://127.0.0.1:{engine_port}", "slots": 8})
    gateway.everywhere(lambda: gateway.workers() == {"worker-0", "spare"}, "a new worker is there")
    gateway.admin("DELETE", "/workers/spare")
    gateway.everywhere(lambda: gateway.workers() == {"worker-0"}, "a removed worker is not")


def test_a_limit_is_one_for_all_processes(gateway: Program) -> None:
    gateway.admin("PUT", "/tenants/small", {"keys": [OTHER], "budget": {"tokens_per_day": 40}})
    gateway.everywhere(lambda: gateway.chat(OTHER) in (200, 429), "the tenant is known")
    gateway.everywhere(lambda: gateway.chat(OTHER) == 429, "its budget is used up everywhere")


def test_a_process_that_dies_is_replaced_and_nothing_is_forgotten(gateway: Program) -> None:
    until(lambda: gateway.metric("evenhand_replicas") == PROCESSES, "all are there")
    until(lambda: len({gateway.metric("evenhand_requests_total") for _ in range(24)}) == 1, "all know all counts")
    counted = gateway.metric("evenhand_requests_total")
    *_, victim = gateway.children()
    os.kill(victim, signal.SIGKILL)
    until(lambda: gateway.said("process gateway-"), "it is said")
    until(lambda: victim not in gateway.children() and len(gateway.children()) == PROCESSES + 1, "it is replaced")
    gateway.everywhere(lambda: gateway.chat() == 200, "all serve")
    until(lambda: gateway.metric("evenhand_requests_total") > counted, "nothing that was counted is lost")


def test_when_their_store_dies_they_serve_on_and_it_is_told_what_it_has_lost(gateway: Program) -> None:
    store, *_ = sorted(set(gateway.children()))
    os.kill(store, signal.SIGKILL)
    until(lambda: gateway.said("process store ended"), "it is said")
    assert [gateway.chat() for _ in range(5)] == [200] * 5
    until(lambda: gateway.said("had lost its records"), "its records are put back")
    gateway.everywhere(lambda: bool(gateway.admin("GET", "/policy")["policy"] == "vtc"), "changes hold")
    gateway.everywhere(lambda: gateway.chat() == 200, "tenants are known")


@pytest.fixture
def open_gateway(engine_port: int, tmp_path: Path) -> Iterator[Program]:
    program = Program(engine_port, tmp_path)
    yield program
    if program.process.poll() is None:
        program.process.terminate()
        program.process.wait(LIMIT_S)


def streamed(port: int, begun: threading.Event) -> bool:
    """Whether a stream comes whole; it takes a second or so."""
    body = {"model": "fake", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.read(1)) == (200, b"d")
        begun.set()
        return answer.read().endswith(b"[DONE]\n\n")


def test_there_is_one_start_up_message_and_running_answers_outlive_a_stop(open_gateway: Program) -> None:
    said = open_gateway.log.read_text()
    assert {text: said.count(text) for text in ("listening on", "OPEN", "is ready")} == {
        "listening on": 1,
        "OPEN": 1,
        "is ready": 1,
    }, said
    begun, children = threading.Event(), open_gateway.children()
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(streamed, open_gateway.port, begun)
        assert begun.wait(LIMIT_S)
        open_gateway.process.send_signal(signal.SIGTERM)
        assert stream.result(LIMIT_S), "a running answer was cut off"
    assert open_gateway.process.wait(LIMIT_S) == 0
    assert not any(map(is_alive, children))


def test_a_taken_port_is_said_before_anything_is_started(gateway: Program) -> None:
    command = [sys.executable, "-m", "server", "--port", str(gateway.port), "--gateway-processes", "2"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert second.returncode == 1
    assert second.stderr == (
        f"evenhand gateway: cannot listen on 127.0.0.1:{gateway.port}: Address already in use. Choose another --port.\n"
    )
