"""
Read metrics.jsonl, in which a run logs one JSON object per line, and draw its losses.
"""

import contextlib
import json
import math
import os

from data.tokenizer import as_value_error


def read_metrics(folder, before=math.inf):
    """Return the records of metrics.jsonl with iter < before; lines that a crash cut off are skipped."""
    records = []
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["iter"] < before:
                    records.append(record)
    return records


def plot_losses(folders, path):
    """Plot the training (pale) and validation losses of runs in one figure.

    The lowest validation loss of each run is marked. FileNotFoundError if no run has metrics yet, ValueError if
    matplotlib is missing.
    """
    with as_value_error("loss curves need matplotlib (pip install matplotlib)"):
        from matplotlib.figure import Figure

    runs = [folder for folder in folders if os.path.exists(os.path.join(folder, "metrics.jsonl"))]
    if not runs:
        raise FileNotFoundError(f"no metrics.jsonl in {', '.join(folders)}")
    for folder in folders:
        if folder not in runs:
            print(f"no metrics.jsonl in {folder} yet")

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, folder in enumerate(runs):
        records = read_metrics(folder)
        color, label = f"C{i}", folder.replace("$", r"\$")  # not mathematics
        train, val = (
            [(r["iter"], r[key]) for r in records if isinstance(r.get(key), float)] for key in ("loss", "val/loss")
        )
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.4)
        if val:
            step, best = min(val, key=lambda point: point[1])
            axes.plot(*zip(*val, strict=True), color=color, marker=".", label=f"{label}: best {best:.4f}")
            axes.plot(step, best, color=color, marker="o")
    axes.set(title="training (pale) and validation loss", xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    # atomically, because a viewer may be reading it
    figure.savefig(path + ".tmp", format="png")
    os.replace(path + ".tmp", path)
