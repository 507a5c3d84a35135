"""guidellm: a short benchmark of streamed chat."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from told import FOLDER, MODEL, URL, same, works

with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.json")
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={URL.removesuffix('/v1')},model={MODEL}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--tokenizer", f"kind=huggingface_auto,model={FOLDER}", "--output", f"kind=json,path={report}"),
        ],
        check=True,
        stdout=sys.stderr,
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    same((len(requests["successful"]), len(requests["errored"])), (20, 0))
    same({one["output_tokens"] for one in requests["successful"]}, {16})
works("run: 20 of 20 streams, 16 tokens each")
