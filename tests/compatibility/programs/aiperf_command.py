"""NVIDIA's aiperf: a short profile of streamed chat."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from told import FOLDER, MODEL, URL, same, works

os.environ.pop("HF_HUB_OFFLINE", None)  # with it, aiperf takes a tokenizer's folder for the name of one in the hub
with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("aiperf")), "profile", "--model", MODEL),
            *("--url", URL.removesuffix("/v1"), "--endpoint-type", "chat", "--streaming", "--tokenizer", FOLDER),
            *("--request-count", "20", "--concurrency", "4", "--synthetic-input-tokens-mean", "32"),
            *(
                "--output-tokens-mean",
                "16",
                "--extra-inputs",
                "ignore_eos:true",
                "--use-server-token-count",
                "--ui",
                "none",
            ),
            *("--artifact-dir", folder),
        ],
        check=True,
        stdout=sys.stderr,
    )
    (report,) = Path(folder).rglob("profile_export_aiperf.json")
    seen = json.loads(report.read_text())
    same(seen["request_count"]["avg"], 20)
    same(seen["output_sequence_length"]["avg"], 16)
    assert seen["time_to_first_token"]["avg"] > 0 and not seen.get("error_summary"), seen.get("error_summary")
works("profile: 20 of 20 streams, 16 tokens each")
