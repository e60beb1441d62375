"""Sections of the report that only a GPU fills."""

from __future__ import annotations

import statistics

from arbitration import WindowTrial, infer_arbitration, windows_that_suffice
from cards import Card
from predictions import beside, predicted, predicted_wait
from results import Record, Results, size_name, time_name
from tables import heading, image, table

# A small copy of inputs may wait this long before a decoding step of 10 ms notices much.
TARGET_SECONDS = 1e-3


def gpu_sections(results: Results, drawn: dict[str, str]) -> list[str]:
    return [kernels(results, drawn), small_copy(results), scatter(results)]


def kernels(results: Results, drawn: dict[str, str]) -> str:
    """Bandwidth of the kernels by page size and by CTAs."""
    parts = []
    records = results.of("kernel")
    if records:
        names = list(dict.fromkeys(record["name"] for record in records))
        rows = []
        for size, pages in sorted({(r["page_bytes"], r["pages"]) for r in records}):
            row = [size_name(size), f"{pages:,}"]
            for name in names:
                found = results.of("kernel", name=name, page_bytes=size, pages=pages)
                row.append(_speed(found[0], results.card) if found else "-")
            rows.append(row)
        parts += [
            heading("Kernels in device memory"),
            "GB/s of device memory, bytes read and bytes written; in brackets divided by the CTAs "
            "that a launch may use (small jobs use fewer).\n",
            image(drawn, "kernels"),
            table(["page", "pages", *names], rows),
        ]
    records = results.of("ctas")
    if records:
        counts = sorted({record["ctas"] for record in records})
        rows = []
        for key in dict.fromkeys((r["memory"], r["name"], r["page_bytes"]) for r in records):
            memory, name, size = key
            row = [memory, name, size_name(size)]
            for count in counts:
                found = results.of("ctas", memory=memory, name=name, page_bytes=size, ctas=count)
                row.append(_swept(found[0], results.card) if found else "-")
            rows.append(row)
        parts += [
            heading("How many CTAs it takes", 3),
            "GB/s by CTAs. Device memory: read and written; mapped host memory: over the link.\n",
            image(drawn, "ctas"),
            table(["memory", "kernel", "page", *map(str, counts)], rows),
        ]
    return "\n".join(parts)


def _speed(record: Record, card: Card | None) -> str:
    a_cta, speed = record.get("gb_per_s_per_cta"), record["gb_per_s"]
    text = f"{speed:.4g}" + (f" ({a_cta:.3g})" if a_cta else "")
    return text + beside(speed, predicted(record, card))


def _swept(record: Record, card: Card | None) -> str:
    speed = record["gb_per_s"]
    return f"{speed:.4g}{beside(speed, predicted(record, card))}"


def small_copy(results: Results) -> str:
    """What a 4 KiB copy waits during a load, and what that says of the copy engine."""
    records = results.of("small copy")
    if not records:
        return ""
    rows = []
    trials: dict[int | None, WindowTrial] = {}
    for record in records:
        during = record["during_seconds"]
        window = record["window_bytes"]
        name = "no bound" if window is None else size_name(window)
        if not during:
            rows.append([name, "-", "-", "-", f"{record['load_gb_per_s']:.3g}", "-"])
            continue
        trials[window] = WindowTrial(max(during), record["load_gb_per_s"])
        verdict = infer_arbitration(
            record["alone_seconds"],
            during,
            record["slice_seconds"],
            record["load_seconds"],
        )
        rows.append(
            [
                name,
                time_name(record["alone_seconds"]),
                time_name(statistics.median(during)),
                time_name(max(during)),
                f"{record['load_gb_per_s']:.3g}",
                verdict.value,
            ]
        )
    enough = windows_that_suffice(trials, TARGET_SECONDS)
    if not enough:
        words = f"No window that was tried keeps every wait under {time_name(TARGET_SECONDS)}."
    elif enough[0] is None:
        words = (
            f"Without a window every wait stays under {time_name(TARGET_SECONDS)}: none is needed."
        )
    else:
        words = (
            f"A window of {size_name(enough[0])} is the widest that keeps every wait under "
            f"{time_name(TARGET_SECONDS)}."
        )
    wait = predicted_wait(results.card)
    if wait is not None:
        words += (
            f" Where an engine serves streams in turn, the model predicts a wait of "
            f"{time_name(wait)} for this card."
        )
    columns = ["window", "alone", "median wait", "longest", "load, GB/s", "what the engine does"]
    return "\n".join(
        [
            heading("A 4 KiB copy of the engine during a load of 4 GiB"),
            table(columns, rows),
            words + "\n",
        ]
    )


def scatter(results: Results) -> str:
    """What a scatter waits behind a busy compute stream."""
    rows = [
        [
            "high" if record["priority"] < 0 else "none",
            time_name(record["alone_seconds"]),
            time_name(record["behind_seconds"]),
            time_name(record["longest_seconds"]),
            time_name(record["product_seconds"]),
        ]
        for record in results.of("scatter latency")
    ]
    if not rows:
        return ""
    columns = ["stream priority", "alone", "behind compute", "longest", "one product"]
    return heading("A scatter of 8 MiB behind a busy compute stream") + table(columns, rows)
