"""
train.py with an injected fault in the first start by torchrun, on rank 1: FAULT=backward, nan, hang or interrupt.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT  # noqa: E402

fault, rank = os.environ["FAULT"], os.environ["RANK"]
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    fault = ""
training_calls = -1  # the first call, in the setup, is not counted
forward, sleep = GPT.forward, time.sleep


def die(*_):
    os.write(2, f"fault: {fault}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def faulty_forward(self, *args, **options):
    global training_calls
    training_calls += self.training
    here = rank == "1" and training_calls == 8
    if fault == "hang" and here:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10**6)
    if fault == "interrupt" and training_calls == 8:  # as Ctrl-C during compilation
        os.kill(os.getpid(), signal.SIGINT)
        if here:
            raise RuntimeError("the compiler was interrupted")
    logits, loss = forward(self, *args, **options)
    if fault == "nan" and here:
        loss = loss * float("nan")
    if fault == "backward" and here:
        loss.register_hook(die)
    return logits, loss


GPT.forward = faulty_forward
time.sleep = lambda seconds: sleep(seconds / 10)  # a rank that fails waits for what the others say
sys.argv[0] = "train.py"
runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
