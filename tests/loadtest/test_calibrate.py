import argparse
from pathlib import Path

import pytest

from loadtest.fake.engine import EngineSetup
from loadtest.fake.faults import Faults
from loadtest.records import Record
from loadtest.simulator import calibrate
from loadtest.simulator.calibrate import CalibrationCheck, ProbeResult, fit
from loadtest.simulator.costmodel import CostModel
from tests.loadtest.engines import engine_in_a_thread

TRUE = CostModel(0.05, 1e-3, 4e-3, 2e-6, max_seqs=16)


def timed(prefill: int, sequences: int, kv: int, request_s: float = 0.0) -> ProbeResult:
    return ProbeResult(prefill, sequences, kv, TRUE.duration_s(prefill, sequences, kv) + request_s, bool(request_s))


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_linear_engine_is_found_exactly() -> None:
    seen = [timed(tokens, 0, 0, request_s=0.01) for tokens in (16, 64, 256, 1024)]
    seen += [timed(0, size, size * kv) for size in (1, 4, 16) for kv in (50, 1000)]
    found = fit(seen, CostModel(max_seqs=16))
    for name in ("iteration_s", "prefill_s_per_token", "decode_s_per_sequence", "attention_s_per_kv_token"):
        assert getattr(found.cost, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert found.cost.start_s_per_sequence == pytest.approx(0.01, rel=1e-6)
    assert max(map(abs, found.errors)) < 1e-9


def test_no_cost_is_negative_whatever_the_noise() -> None:
    seen = [ProbeResult(0, size, 0, 0.05 - 1e-4 * size) for size in (1, 2, 4, 8)] + [
        timed(tokens, 0, 0) for tokens in (8, 99)
    ]
    found = fit(seen, CostModel())
    assert found.cost.decode_s_per_sequence == 0.0
    assert found.cost.iteration_s > 0


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([timed(8, 0, 0)] * 4, CostModel())


def test_a_check_tells_the_error_of_each_request() -> None:
    real = [Record(str(at), "t", 0, 0, 2.0, 1, 2, ttft_s=1.0) for at in range(4)]
    told = [Record(str(at), "t", 0, 0, 2.2, 1, 2, ttft_s=0.9) for at in range(4)]
    assert "TTFT: 10.0% in the median, -10.0% at P99; E2E: 10.0%" in str(
        CalibrationCheck(list(zip(real, told, strict=True)))
    )


def test_an_engine_is_probed_fitted_and_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    setup = EngineSetup(cost=CostModel(0.004, 100e-6, 1e-3, max_seqs=4, kv_capacity_tokens=1 << 16))
    with engine_in_a_thread(setup=setup) as engine:
        argv = ("--url", engine.url, "--out", str(out), "--check", "15", "--length-scale", "0.05")
        assert calibrate.run(parsed(*argv)) == 0
    said = capsys.readouterr()
    assert "4 slots" in said.err  # as its metrics said under load
    assert "error on 15 requests" in said.out
    found = CostModel.read(out)
    assert found.max_seqs == 4
    assert found.prefill_s_per_token > 20e-6


def test_a_failing_engine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with engine_in_a_thread(Faults(error_status=500)) as engine:
        assert calibrate.run(parsed("--url", engine.url, "--slots", "2")) == 2
    assert "A probe failed: failed" in capsys.readouterr().err
