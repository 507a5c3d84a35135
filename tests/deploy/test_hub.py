"""A model is fetched from its hub before its engine starts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.model.hub import HubWeights, fetched_here, wanted, weigh
from tests.deploy.fake_hub import NAME, NEEDED, Hub, running, there

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as one:
        yield one


def download(hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    program = "from deploy.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    environ = {**os.environ, **hub.environ(home)}
    return subprocess.run(
        [sys.executable, "-c", program, "model", "download", NAME],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_what_the_engine_reads_is_fetched_once_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    first = download(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0] == f"downloading {NAME}: 0.4 MB to {tmp_path}/hub"
    assert there(tmp_path) == {name for name, _ in hub.sent} == NEEDED
    hub.sent.clear()
    again = download(hub, tmp_path)
    assert again.returncode == 0 and "downloading" not in again.stdout
    assert hub.sent == []


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on_from_there(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 20_000  # the hub's own library goes on a few times, and then gives up
    broken = download(hub, tmp_path)
    assert broken.returncode == 1
    assert "start again to resume the download" in broken.stderr.splitlines()[-1]
    got = there(tmp_path)
    assert got < NEEDED
    hub.cut_after = None
    hub.sent.clear()
    whole = download(hub, tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert there(tmp_path) == NEEDED
    assert {name for name, _ in hub.sent} == NEEDED - got


@pytest.mark.parametrize(
    ("refused", "advice"),
    [
        ("RepoNotFound", "has no model owner/model, or it is private"),
        ("GatedRepo", "requires its terms to be accepted"),
    ],
)
def test_a_refusal_is_one_sentence_that_says_what_to_do(hub: Hub, tmp_path: Path, refused: str, advice: str) -> None:
    hub.refused = refused
    done = download(hub, tmp_path)
    assert done.returncode == 1
    assert advice in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_its_hub_a_model_is_taken_from_the_cache_or_missed_in_one_sentence(tmp_path: Path) -> None:
    with running() as hub:
        assert download(hub, tmp_path / "full").returncode == 0
    cached, missed = download(hub, tmp_path / "full"), download(hub, tmp_path / "empty")
    assert (cached.returncode, missed.returncode) == (0, 1)
    assert "using what the cache holds" in cached.stdout
    assert "is not on this machine" in missed.stderr.splitlines()[-1]
    assert "Traceback" not in missed.stderr


def test_weights_are_weighed_before_they_are_fetched_and_from_the_cache_without_the_hub(tmp_path: Path) -> None:
    def told(hub: Hub) -> dict[str, object]:
        command = [sys.executable, "-P", "-m", "deploy.model.hub", NAME]
        environ = {**os.environ, **hub.environ(tmp_path)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=True)
        said = json.loads(done.stdout)
        assert isinstance(said, dict)
        return said

    with running() as hub:
        assert told(hub) == {"file_bytes": 400_000, "dtype": "float32"}
        assert {name for name, _ in hub.sent} == {"config.json"}
        assert download(hub, tmp_path).returncode == 0
    assert told(hub) == {"file_bytes": 400_000, "dtype": "float32"}


def test_a_model_that_nobody_can_weigh_has_no_known_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert weigh("owner/nowhere") == HubWeights()


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["a.bin", "training_args.bin", "config.json"], ["a.bin", "config.json"]),
        (["consolidated.safetensors", "params.json"], ["consolidated.safetensors", "params.json"]),
        (
            ["m.safetensors", "m.gguf", "onnx/m.json", "1_Pooling/config.json"],
            ["1_Pooling/config.json", "m.safetensors"],
        ),
        ([], []),
    ],
)
def test_one_form_of_the_weights_and_what_is_small(names: list[str], kept: list[str]) -> None:
    assert wanted(names) == kept


@pytest.mark.parametrize(
    ("args", "environ", "here"),
    [
        (["--max-num-seqs=8"], {}, True),
        (["--revision", "v2"], {}, False),
        (["--download_dir=/data"], {}, False),
        ([], {"VLLM_USE_MODELSCOPE": "1"}, False),
    ],
)
def test_what_the_engine_would_fetch_otherwise_is_left_to_it(
    args: list[str], environ: dict[str, str], here: bool
) -> None:
    assert fetched_here(args, environ) is here
