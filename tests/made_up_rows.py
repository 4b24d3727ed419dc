"""Rows for the tests of tables and pictures."""

import csv

from harness.rows import COLUMNS


def row(item, batch_size, median, **fields):
    ok = median is not None
    times = {"mean": 1.01, "median": 1, "std": 0.01, "min": 0.9, "p90": 1.1, "p99": 1.2}
    return {
        "model_name": "some/model",
        "test_item": item,
        "batch_size": batch_size,
        "status": "ok" if ok else "failed",
        **{f"infer_time_{name}_ms": median * factor if ok else "" for name, factor in times.items()},
        "compile_time_s": "" if item == "torch" or not ok else 7.25,
        "error": "" if ok else "RuntimeError: a | b",
        "precision": "fp32",
        "device_name": "GPU A",
        "weights": "random",
        "input_shape": f"pixel_values={batch_size}x3x224x224",
        "torch_version": "2",
        "tvm_version": "0.27",
        "timestamp_utc": "2026-01-01T00:00:00+00:00",
        **fields,
    }


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path
