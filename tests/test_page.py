"""sample.py --serve, asked by gradio's own client."""

import re
import signal

import pytest


@pytest.fixture
def page(trained, start_process, monkeypatch):
    """The process that serves the page of a tiny model, and its address."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # the client would look up a machine far away
    flags = (f"--out_dir={trained}", "--device=cpu", "--dtype=float32", "--temperature=0", f"--max_new_tokens={10**9}")
    process = start_process("sample.py", *flags, "--serve=True")
    address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    assert address, process.communicate()
    return process, address[0]


def test_visitors_stream_text_and_mistakes_are_answered(page, sample):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    process, address = page
    expected = sample("--start=Call me Ish", "--max_new_tokens=20", "--num_samples=1", "--temperature=0").out
    clients = [Client(address, verbose=False) for _ in range(2)]
    jobs = [client.submit("Call me Ish", length=20, api_name="/generate") for client in clients]  # at once
    for job in jobs:
        text, speed = job.result(timeout=60)
        assert f"{text}\n---------------\n" == expected and re.fullmatch(r"[\d.]+ tokens/s", speed)
        pieces = [text for text, _ in job.outputs()]
        assert pieces[0] == "Call me Ish" and all(b.startswith(a) for a, b in zip(pieces, pieces[1:], strict=False))
        assert len(pieces) > 10
    ask = clients[0].predict
    assert ask("Call me Ish", 0, 0, 0, 20, "l", api_name="/generate")[0] == "Call me Ishmae"
    assert len(ask("Call", 2.0, 5, 0.9, 7, "", api_name="/generate")[0]) == 11
    assert ask("", length=3, api_name="/generate")[0]
    for wrong, message in ((dict(prompt="日本"), "no token for"), (dict(temperature=-1), "less than minimum value")):
        with pytest.raises(AppError, match=message):
            ask(**{"prompt": "Call", "length": 9} | wrong, api_name="/generate")
    endless = [clients[0].submit("Call", 1, 0, 0, 10**9, "", api_name="/generate") for _ in range(8)]  # as many as go
    for job in endless:
        next(iter(job))
        assert job.cancel()
    assert clients[1].submit("Call me Ish", length=20, api_name="/generate").result(timeout=120)[0] == text
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "no token for" not in process.stderr.read()  # the visitor was told, not the terminal
