"""Plots of a run. matplotlib is needed here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle
from results import PATHS, Record, Results, contenders_in, crossover, largest_jobs, size_name

COLORS = {
    "staged": "#1b6ca8",
    "zero_copy": "#d1495b",
    "copy_engine": "#3a9d5d",
    "auto": "#111111",
    "vLLM": "#e08e1b",
    "batched copy": "#8d6bb8",
    "batched copy, overlap": "#c3a6e0",
    "copy per page": "#8a8a8a",
    "index_select": "#5fb7c5",
}
DIRECTIONS = ("store", "load")


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Every plot that there are records for, as PNG files in `folder`."""
    drawings: dict[str, Callable[[Results], Any]] = {
        "bandwidth": bandwidth,
        "crossover": crossover_map,
        "interference": interference,
        "kernels": kernels,
        "ctas": ctas,
        "planning": planning,
    }
    drawn = []
    for name, draw in drawings.items():
        figure = draw(results)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110)
            plt.close(figure)
            drawn.append(path)
    return drawn


def bandwidth(results: Results) -> Any:
    """GB/s over page size, each page size with its largest job; the plain copy is the limit."""
    records = largest_jobs(results.of("transfer"))
    if not records:
        return None
    figure, axes = _panels(2, results, "Bandwidth by page size, largest job of each size")
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        mine = [record for record in records if record["direction"] == direction]
        for name in contenders_in(mine):
            points = _points(mine, name, "gb_per_s")
            style = "-o" if name in PATHS or name == "auto" else "--s"
            ax.plot(*points, style, color=COLORS[name], label=name, markersize=4, linewidth=1.6)
        limits: dict[int, list[float]] = {}
        for record in mine:
            limits.setdefault(record["page_bytes"], []).append(record["limit_gb_per_s"])
        sizes = sorted(limits)
        middle = [sorted(limits[size])[len(limits[size]) // 2] for size in sizes]
        ax.plot(sizes, middle, color="black", linestyle=":", linewidth=2, label="one plain copy")
        _size_axis(ax, sizes, "page size")
        _speed_axis(ax, "GB/s")
        ax.set_title(direction)
    _legend_below(figure, axes[0])
    return figure


def crossover_map(results: Results) -> Any:
    """Which of our paths is fastest, over page size and number of pages."""
    records = results.of("transfer")
    if not records:
        return None
    figure, axes = _panels(2, results, "Fastest path, its GB/s, and its lead over the next")
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        winners = crossover([r for r in records if r["direction"] == direction])
        sizes = sorted({size for size, _ in winners})
        counts = sorted({count for _, count in winners})
        for (size, count), winner in winners.items():
            x, y = sizes.index(size), counts.index(count)
            color = COLORS[winner.path]
            ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=color))
            lead = "" if winner.gain is None else f"\n{winner.gain:.2f}x"
            text = f"{winner.gb_per_s:.3g} GB/s{lead}"
            ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white")
        ax.set_xticks(range(len(sizes)), [size_name(size) for size in sizes], rotation=30)
        ax.set_yticks(range(len(counts)), [f"{count:,}" for count in counts])
        ax.set_xlim(-0.6, len(sizes) - 0.4)
        ax.set_ylim(-0.6, len(counts) - 0.4)
        ax.set_xlabel("page size")
        ax.set_ylabel("pages of the job")
        ax.set_title(direction)
    handles = [Patch(color=COLORS[path], label=path) for path in PATHS]
    figure.legend(handles=handles, loc="lower center", ncol=3, frameon=False)
    return figure


def interference(results: Results) -> Any:
    """How many times longer the model takes beside transfers."""
    records = results.of("interference")
    if not records:
        return None
    models = list(dict.fromkeys(record["model"] for record in records))
    names = contenders_in(records)
    figure, axes = _panels(len(models), results, "Slowdown of a model beside transfers", share=True)
    for ax, model in zip(axes, models, strict=True):
        for offset, direction in zip((-0.2, 0.2), DIRECTIONS, strict=True):
            mine = {
                record["contender"]: record["slowdown"]
                for record in records
                if record["model"] == model and record["direction"] == direction
            }
            places = [i + offset for i, name in enumerate(names) if name in mine]
            heights = [mine[name] for name in names if name in mine]
            color = "#1b6ca8" if direction == "store" else "#e08e1b"
            bars = ax.bar(places, heights, width=0.38, color=color, label=direction)
            ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        ax.axhline(1, color="black", linewidth=1, linestyle=":")
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.set_title(model)
        ax.margins(y=0.12)
    axes[0].set_ylabel("time beside transfers / time alone")
    _legend_below(figure, axes[0])
    return figure


def kernels(results: Results) -> Any:
    """GB/s of device memory over page size."""
    records = largest_jobs(results.of("kernel"))
    if not records:
        return None
    figure, (ax,) = _panels(1, results, "Device memory, read and written: largest job of each size")
    for name in dict.fromkeys(record["name"] for record in records):
        mine = sorted(
            (record["page_bytes"], record["gb_per_s"])
            for record in records
            if record["name"] == name
        )
        ax.plot(*zip(*mine, strict=True), "-o", markersize=4, label=name)
    _size_axis(ax, sorted({record["page_bytes"] for record in records}), "page size")
    _speed_axis(ax, "GB/s, bytes read and bytes written")
    _legend_below(figure, ax)
    return figure


def ctas(results: Results) -> Any:
    """GB/s over the number of CTAs."""
    records = results.of("ctas")
    if not records:
        return None
    memories = list(dict.fromkeys(record["memory"] for record in records))
    figure, axes = _panels(len(memories), results, "What a number of CTAs reaches")
    for ax, memory in zip(axes, memories, strict=True):
        series: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for record in records:
            if record["memory"] == memory:
                key = record["name"], record["page_bytes"]
                series.setdefault(key, []).append((record["ctas"], record["gb_per_s"]))
        for (name, size), points in series.items():
            style = "-o" if name == "gather" else "--s"
            ax.plot(
                *zip(*sorted(points), strict=True),
                style,
                markersize=4,
                label=f"{name}, {size_name(size)}",
            )
        counts = sorted({record["ctas"] for record in records})
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.set_xlabel("CTAs")
        _speed_axis(ax, "GB/s")
        ax.set_title(memory)
    _legend_below(figure, axes[0])
    return figure


def planning(results: Results) -> Any:
    """Milliseconds of the caller over blocks of a job."""
    records = results.of("planning")
    if not records:
        return None
    tensors = sorted({record["tensors"] for record in records})
    figure, axes = _panels(len(tensors), results, "What a job costs its caller", share=True)
    for ax, count in zip(axes, tensors, strict=True):
        mine = [record for record in records if record["tensors"] == count]
        lines = {"planning": [(r["blocks"], r.seconds) for r in mine]}
        lines["planning, vLLM"] = [
            (r["blocks"], r["peer_seconds"]) for r in mine if r.get("peer_seconds")
        ]
        for record in results.of("submission", tensors=count):
            slots = ", scattered slots" if record["slots"] == "scattered" else ""
            name = f"submission, {record['path']}{slots}"
            lines.setdefault(name, []).append((record["blocks"], record.seconds))
        for name, points in lines.items():
            if points:
                x, y = zip(*sorted(points), strict=True)
                style = "-o" if name.startswith("planning") else "--s"
                ax.plot(x, [1e3 * value for value in y], style, markersize=4, label=name)
        blocks = sorted({record["blocks"] for record in mine})
        ax.set_xscale("log", base=2)
        ax.set_xticks(blocks, [f"{block:,}" for block in blocks], rotation=30)
        ax.minorticks_off()
        ax.set_xlabel("blocks of a job")
        ax.set_title(f"{count} tensors")
        _speed_axis(ax, "")
    axes[0].set_ylabel("ms of the calling thread")
    _legend_below(figure, axes[0])
    return figure


def _panels(count: int, results: Results, title: str, *, share: bool = False) -> Any:
    width = max(8.0, 1 + 5.4 * count)
    figure, axes = plt.subplots(1, count, figsize=(width, 5.6), sharey=share, squeeze=False)
    card = results.facts.get("GPU", "a GPU") if results.on_gpu else "host device: CPU memory"
    figure.suptitle(f"{title} ({card})", fontsize=12)
    # Inches for the axis labels, and below for the legend.
    figure.subplots_adjust(
        left=0.9 / width, right=1 - 0.25 / width, top=0.87, bottom=0.28, wspace=0.25
    )
    return figure, axes[0]


def _points(records: Sequence[Record], name: str, value: str) -> tuple[list[int], list[float]]:
    mine = sorted((r["page_bytes"], r[value]) for r in records if r["contender"] == name)
    return [x for x, _ in mine], [y for _, y in mine]


def _size_axis(ax: Any, sizes: Sequence[int], label: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [size_name(size) for size in sizes], rotation=30)
    ax.minorticks_off()
    ax.set_xlabel(label)


def _speed_axis(ax: Any, label: str) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else ""
    )
    ax.tick_params(axis="y", which="minor", labelsize=7)
    ax.grid(True, which="major", alpha=0.3)
    ax.set_ylabel(label)


def _legend_below(figure: Any, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    columns = min(5, max(1, len(labels)))
    figure.legend(handles, labels, loc="lower center", ncol=columns, frameon=False, fontsize=9)
