"""The command `llm`, told of the model in its extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from told import ANSWER, MODEL, QUESTION, URL, same, works

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "London"]}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"],
    "additionalProperties": False,
}


def llm(*words: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout.strip()


with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    described = [
        {
            "model_id": "evenhand",
            "model_name": MODEL,
            "api_base": URL,
            "api_key_name": "evenhand",
            "supports_schema": True,
        }
    ]
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps(described))  # JSON is YAML
    Path(folder, "keys.json").write_text(json.dumps({"evenhand": "any"}))
    options = ["-m", "evenhand", "-o", "temperature", "0", "-o", "max_tokens", "40"]
    same(llm(*options, QUESTION), ANSWER)
    works("a streamed prompt")
    same(llm(*options, "--no-stream", QUESTION), ANSWER)
    works("--no-stream")
    same(set(json.loads(llm(*options, "--schema", json.dumps(SCHEMA), "Describe Paris."))), {"city", "capital"})
    works("--schema")
    same(llm("logs", "-r", "-n", "1") != "", True)
    works("its log")
