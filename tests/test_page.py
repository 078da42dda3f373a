"""sample.py --serve, requested by gradio's own client."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # the client would connect to another machine

from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402


@contextlib.contextmanager
def serve(trained):
    """The process that serves the page of a tiny model, and its address."""
    flags = (f"--out_dir={trained}", "--device=cpu", "--dtype=float32", "--temperature=0", f"--max_new_tokens={10**9}")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "sample.py", *flags, "--serve=True"], cwd=ROOT, **pipes)
    address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    assert address, process.communicate()
    try:
        yield process, address[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def page(trained):
    """The address of a page for all tests."""
    with serve(trained) as (_, address):
        yield address


@pytest.fixture
def client(page):
    return Client(page, verbose=False)


def test_several_visitors_stream_the_same_text(page, sample):
    expected = sample("--start=Call me Ish", "--max_new_tokens=20", "--num_samples=1", "--temperature=0").out
    clients = [Client(page, verbose=False) for _ in range(2)]
    jobs = [client.submit("Call me Ish", length=20, api_name="/generate") for client in clients]  # at once
    for job in jobs:
        text, speed = job.result(timeout=60)
        assert f"Call me Ish{text}\n---------------\n" == expected and re.fullmatch(r"[\d.]+ tokens/s", speed)
        pieces = [text for text, _ in job.outputs()]
        assert pieces[0] == "" and len(pieces) > 10
        assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:], strict=False))


def test_sampling_options(client):
    assert client.predict("Call me Ish", 0, 0, 0, 20, "l", api_name="/generate")[0] == "mae"
    assert len(client.predict("Call", 2.0, 5, 0.9, 7, "", api_name="/generate")[0]) == 7
    seeded = [client.predict("Call", 2.0, 0, 0, 50, "", seed, api_name="/generate")[0] for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert client.predict("", length=3, api_name="/generate")[0]


@pytest.mark.parametrize(
    "inputs, message", [(dict(prompt="日本"), "no token for"), (dict(temperature=-1), "less than minimum value")]
)
def test_visitors_see_their_mistakes(client, inputs, message):
    with pytest.raises(AppError, match=message):
        client.predict(**{"prompt": "Call", "length": 9} | inputs, api_name="/generate")


def test_page_names_the_model(page):
    assert re.search('content="plainGPT: [^"]*ckpt[^"]*, step ', request(page)[1])


def request(url, data=None, **headers):
    """Return the status code and the text of an answer."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


@pytest.mark.parametrize("host, code", [("127.0.0.1", 200), ("localhost:80", 200), ("a.com", 400), ("a.com:80", 400)])
def test_only_names_of_this_machine_are_served(page, host, code):
    assert [request(page + path, Host=host)[0] for path in ("", "gradio_api/info")] == [code, code]


def test_browsers_request_nothing_from_other_machines(page):
    assert "Content-Security-Policy content=\"default-src 'self'" in json.loads(request(page + "config")[1])["head"]


def test_uploads_are_refused(page):
    body = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n--B--\r\n'
    code, text = request(page + "gradio_api/upload", body, Content_Type="multipart/form-data; boundary=B")
    assert code == 413 and "exceeded maximum allowed size of 0 bytes" in text


def wait_for_output(job):
    """Wait until a job has streamed something; not by its iterator, which can block for ever."""
    deadline = time.monotonic() + 180  # several generations share two cores
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.outputs()


def test_cancel_makes_room_for_others(client):
    endless = []
    for _ in range(4):  # one after the other: of eight sent at once, one sometimes had no output for minutes
        endless.append(client.submit("Call", 1, 0, 0, 10**9, "", api_name="/generate"))
        wait_for_output(endless[-1])
    assert all(job.cancel() for job in endless)
    assert client.submit("Call me Ish", length=20, api_name="/generate").result(timeout=120)[0]


def test_requests_that_nobody_reads_block_no_visitor(page, client):
    endless = json.dumps({"data": ["Call", 1, 0, 0, 10**9, ""]}).encode()
    for _ in range(8):
        assert request(page + "gradio_api/call/generate", endless, Content_Type="application/json")[0] == 200
    assert client.submit("Call me Ish", length=20, api_name="/generate").result(timeout=60)[0]


def test_ctrl_c_ends_the_page(trained):
    with serve(trained) as (process, address):  # its own: the other tests need theirs
        client = Client(address, verbose=False)
        with pytest.raises(AppError):
            client.predict("日本", api_name="/generate")
        wait_for_output(client.submit("Call", 1, 0, 0, 10**9, "", api_name="/generate"))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "no token for" not in process.stderr.read()  # visitors see their mistakes, the terminal does not
