"""Programs that run vLLM, as a user starts them: the example, the server, the benchmark."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
Environment = Callable[[str], dict[str, str]]
ALL_FUSED = "gatefuse: 2 of 2 shared-expert gates fused (placement inline)"


def test_example(place: Path, environment: Environment) -> None:
    """Starts only if each gate is fused."""
    model = str(place / "models" / "qwen2_moe")
    options = ["--ids", "--expect", "2", "--max-model-len", "128"]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples" / "vllm_offline.py"), model, *options),
            *("--gpu-memory-utilization", "0.3"),
        ],
        env=environment("example"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout.count("shared-expert gates fused") == 1
    assert ALL_FUSED in done.stdout


def test_serve(place: Path, environment: Environment) -> None:
    """`vllm serve` with the pass named by a flag, beside the plugin."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    model = str(place / "models" / "qwen2_moe")
    passes = {"post_grad_custom_post_pass": "gatefuse.vllm_pass"}
    log = place / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("vllm")), "serve", model),
                *("--host", "127.0.0.1", "--port", address.split(":")[1]),
                *("--skip-tokenizer-init", "--max-model-len", "128", "--max-num-seqs", "4"),
                *("--gpu-memory-utilization", "0.3", "--compilation-config"),
                json.dumps({"mode": 3, "inductor_passes": passes}),
            ],
            env=environment("serve"),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(server, f"http://{address}/health", log)
        body = dict(prompt=[3, 5, 7, 11], max_tokens=4, temperature=0, ignore_eos=True)
        answer = _post(
            f"http://{address}/v1/completions", body | dict(model=model, return_token_ids=True)
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    assert len(answer["choices"][0]["token_ids"]) == 4
    text = log.read_text()
    assert text.count("shared-expert gates fused") == 1
    assert ALL_FUSED in text


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            alive = server.poll() is None and time.monotonic() < deadline
            assert alive, log.read_text()[-8000:]
            time.sleep(0.5)


def _post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_benchmark(place: Path, environment: Environment, tmp_path: Path) -> None:
    """All of benchmarks/vllm but the sizes: engines that take turns, rounds, profiles, tables.

    The hand-written kernel is called once in each layer; the plugin's gate is in Inductor's code.
    """
    command = [sys.executable, "-m", "benchmarks.vllm", "--out", str(tmp_path), "--tiny"]
    done = subprocess.run(
        [*command, "--layers", "2", "--providers", "plugin,hand-kernel", "--rounds", "2"],
        env=environment("benchmark"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["engines"]["plugin"]["lines"] == [ALL_FUSED]
    assert content["engines"]["hand-kernel"]["lines"] == []
    rows = {(row["provider"], row["name"]): row for row in content["rows"]}
    assert set(rows) == {
        (provider, workload)
        for provider in ("plugin", "hand-kernel")
        for workload in ("decode-2", "prefill")
    }
    for (provider, name), row in rows.items():
        assert row["repeats"] == 2
        assert row["new_tokens_per_s"] > 0
        assert row["profile"]["steps"] == (16 if name == "decode-2" else 1)
        calls = {k["name"]: k["per_step"] for k in row["profile"]["by_name"]}
        expected = 2 if provider == "hand-kernel" else 0
        assert calls.get("gatefuse::linear_sigmoid_mul", 0) == expected
    assert re.search(r"\| hand-kernel +\| +\d", done.stdout)
