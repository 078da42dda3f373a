"""
Read metrics.jsonl, in which a run logs one JSON object per line, and draw its losses.
"""

import contextlib
import json
import math
import os


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
    """Draw the training (pale) and validation losses of runs into one picture.

    OSError if a run has no metrics, ValueError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("loss curves need matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, folder in enumerate(folders):
        label = folder.replace("$", r"\$")  # not mathematics
        for key, style in (("loss", {"alpha": 0.4}), ("val/loss", {"marker": ".", "label": label})):
            points = [record for record in read_metrics(folder) if isinstance(record.get(key), float)]
            axes.plot([r["iter"] for r in points], [r[key] for r in points], color=f"C{i}", **style)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    # atomically, because a viewer may be reading it
    figure.savefig(path + ".tmp", format="png")
    os.replace(path + ".tmp", path)
