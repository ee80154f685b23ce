"""The runtime where nothing but numpy, onnxruntime, tokenizers and jinja2 can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_tokenizers import CHAT_TEMPLATE, byte_level, config_json

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
BLOCKED = {"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers", "exporter", "graph_passes",
           "reference", "click", "rich"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
"""
GENERATE = """
from runtime import generate_text, load
session = load(sys.argv[2], threads=1, verify=True)
print(list(session.generate([5, 6, 7], max_new_tokens=12)))
session.reset()
stream = generate_text(session, [{"role": "user", "content": "the wind"}], max_new_tokens=4, temperature=1.0, seed=1)
"".join(stream)
print(len(stream.result.token_ids))
"""
QUICK = """
import runtime
print(sorted({name.split(".")[0] for name in sys.modules} & {"onnxruntime", "tokenizers", "jinja2"}))
"""


def run(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", BLOCK + code, str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_loads_and_generates_without_torch_and_onnx(tmp_path: Path) -> None:
    model = ToyModel(vocab_size=320)
    files = {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": config_json(),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    ids, count = run(GENERATE, str(write_toy_bundle(tmp_path, model, files)))
    assert ids == str(model.greedy([5, 6, 7], 12))
    assert count == "4"


def test_importing_loads_no_engine_and_no_tokenizer() -> None:
    assert run(QUICK) == ["[]"]
