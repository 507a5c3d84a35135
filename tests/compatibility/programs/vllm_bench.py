"""`vllm bench serve`, of the vLLM that is installed beside the gateway: chat and completions.

Its function is called as the command does, for the command `vllm` refuses to run in the CPU distribution.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

from told import FOLDER, MODEL, URL, same, works
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
for backend, path in (("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")):
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *("--backend", backend, "--base-url", URL.removesuffix("/v1"), "--endpoint", path),
            *("--model", MODEL, "--tokenizer", FOLDER, "--dataset-name", "random", "--random-input-len", "32"),
            *("--random-output-len", "16", "--num-prompts", "20", "--max-concurrency", "4", "--ignore-eos"),
            *("--save-result", "--result-dir", folder),
        ]
        with contextlib.redirect_stdout(sys.stderr):
            main(parser.parse_args(words))
        (report,) = Path(folder).glob("*.json")
        seen = json.loads(report.read_text())
    same((seen["completed"], seen["total_output_tokens"]), (20, 20 * 16))
    works(f"{backend}: 20 of 20 streams, 16 tokens each")
