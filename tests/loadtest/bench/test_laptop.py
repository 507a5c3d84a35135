"""What `evenhand bench laptop` makes of what it saw; the servers themselves are real ones and take minutes."""

import subprocess
import sys
from pathlib import Path
from random import Random

from loadtest.bench.policies import laptop
from loadtest.bench.policies.laptop import LLAMA, OURS, STOCK, Side, measure, memory_gib, table
from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS
from tests.deploy.processes import eventually


def test_each_row_tells_every_side_and_what_ours_is_to_the_others() -> None:
    sides = [Side(name, "", "", start_s, 1.5) for name, start_s in ((OURS, 20.0), (STOCK, 25.0), (LLAMA, 0.5))]
    for one, speeds in zip(sides, ([100.0, 120.0, 110.0], [100.0, 90.0, 100.0], [44.0, 40.0, 50.0]), strict=True):
        for speed in speeds:
            one.note("tokens/s, 16 at once", speed)
    lines = table(sides).splitlines()
    assert lines[0] == ("| one core | evenhand serve | stock vLLM | llama.cpp | ours ÷ stock vLLM | ours ÷ llama.cpp |")
    assert "110.00 (100.00–120.00)" in lines[2] and lines[2].endswith("| 1.10 | 2.50 |")
    assert lines[3] == "| command → first answer, s | 20.0 | 25.0 | 0.5 | 0.80 | 40.00 |"


async def test_a_round_asks_prompts_of_each_length_and_so_many_streams_at_once() -> None:
    async with FakeEngine(EngineSetup(model="smollm2", cost=PRESETS["instant"])) as engine:
        one = Side(OURS, engine.url, "", 1.0, 1.0)
        await measure(one, Random(1), warm_up=True)
        assert one.seen == {}
        await measure(one, Random(2), warm_up=False)
    assert list(one.seen) == [
        *(f"TTFT of {tokens} tokens, s" for tokens in laptop.PROMPTS_TOKENS),
        *(f"tokens/s, {streams} at once" for streams in laptop.STREAMS),
    ]


def test_memory_is_that_of_all_that_writes_to_the_log_and_of_what_it_started(tmp_path: Path) -> None:
    held = 64 * 1024**2
    child = f"held = bytearray(b'x' * {held}); print('up', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)"
    log = tmp_path / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=out) as it,
    ):
        assert eventually(lambda: memory_gib(log) > held / 2**30)
        it.communicate(b"\n")
    assert memory_gib(tmp_path / "other") == 0
