"""Imports point one way, and each part needs no more than it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SLOW_FILES

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "triton_offload"

# From the bottom up: a module may import those of lower layers, and its own.
LAYERS = [
    {"scheduler", "transfer", "pool", "tuning", "doctor", "cli"},  # nothing but their names
    {"kernels.arguments"},  # numpy alone
    {"scheduler.order", "scheduler.free_slots"},
    {
        "version",
        "process_lock",
        "cache_files",
        "closing",
        "errors",
        "specs",
        "sizes",
        "kernels.table",
        "kernels.tiles",
    },
    {"vllm.versions", "vllm.lost_chunks", "vllm.worker_metadata", "vllm.stale_regions"},
    {"vllm.failed_stores", "vllm.group_bytes"},
    {"cli.models", "cli.output", "cli.demo_model"},
    {"scheduler.policies", "scheduler.chunks", "pool.shared_memory", "calibration", "stats"},
    {"slabs"},
    {"vllm.group_pool"},
    {"scheduler.base", "scheduler.orphans", "scheduler.guarded_policy"},
    {"kernels.sums", "kernels.block_run"},
    {"scheduler.room", "scheduler.shared_slabs", "kernels.adding"},
    {"scheduler.shared_room", "kernels.movers"},
    {"medium", "kernels.fragments", "kernels.tiling", "kernels.ring", "kernels.reference"},
    {"transfer.options", "device.threads", "device.driver", "device.numa", "pool.memory_limits"},
    {"device.native"},
    {"scheduler.manager", "kernels.compiling", "vllm.options", "vllm.group_slots"},
    {"kernels.pages", "device.base", "device.realtime", "device.host_torch"},
    {"device.cuda_batches", "device.cuda_memory", "device.host_pages", "pool.placement"},
    {"device.host", "device.cuda", "device.deferred"},
    {"device"},
    {"pool.preparation"},
    {"pool.host_pool", "transfer.layout"},
    {"transfer.staging", "transfer.ranges", "transfer.last_jobs", "transfer.slot_order"},
    {"transfer.checksums", "transfer.sum_memory", "transfer.contents"},
    {"transfer.segment", "transfer.paths", "transfer.layers"},
    {"transfer.lane_streams", "transfer.job"},
    {"transfer.paths.base", "transfer.endings", "transfer.results"},
    {"transfer.paths.staged", "transfer.paths.zero_copy", "transfer.paths.copy_engine"},
    {"transfer.paths.table"},
    {"transfer.lane_paths"},
    {"transfer.lane"},
    {"transfer.lanes"},
    {"transfer.jobs_under_way"},
    {"transfer.pipeline"},
    {"transfer.worker"},
    {"transfer.device_worker", "transfer.function_worker"},
    {"transfer.queue_manager"},
    {"testing.races", "testing.background"},
    {"testing.schedule"},
    {"testing.places", "testing.faults"},
    {"testing.work"},
    {"testing.simulation"},
    {"testing.controls"},
    {"testing.simulated"},
    {"testing"},
    {"testing.engine"},
    {"testing.serving"},
    {"testing.layered", "testing.prefill"},
    {"tuning.calibration_file", "tuning.fitting", "tuning.rig"},
    {"tuning.machine"},
    {"tuning.calibrate"},
    {"job", "doctor.facts"},
    {"ledger", "request"},
    {"jobs"},
    {"medium_jobs"},
    {"offloader", "doctor.checks"},
    {""},  # the package itself: its public names
    {"cli.replay", "vllm.worker", "metrics"},
    {"vllm.layer_loads"},
    {"vllm.tolerant_worker"},
    {"vllm.metrics"},
    {"vllm.spec", "vllm.connector_worker", "vllm.connector_scheduler"},
    {"vllm.canonical"},
    {"vllm.tiering_spec"},
    {"vllm.connector"},
    {"vllm"},
    {"cli.demo", "cli.machine"},
    {"cli.main"},
    {"__main__"},
]
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    found = {}
    for file in files:
        parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = file
    return found


def imports(name: str, file: Path) -> set[str]:
    """The project's modules that a module imports, type-checking blocks apart."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, ["triton_offload", package, base]))
            names = {f"{base}.{alias.name}" for alias in node.names}
            known = {f"triton_offload.{module}".rstrip(".") for module in LAYER_OF}
            found |= {n if n in known else base for n in names}
    return {
        n.removeprefix("triton_offload").removeprefix(".")
        for n in found
        if n.split(".")[0] == "triton_offload"
    }


def test_every_module_has_its_layer():
    assert set(modules()) == set(LAYER_OF)


@pytest.mark.parametrize("name", sorted(LAYER_OF), ids=lambda name: name or "triton_offload")
def test_imports_point_one_way(name):
    for other in imports(name, modules()[name]):
        assert LAYER_OF[other] < LAYER_OF[name], f"{name} imports {other}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("triton_offload.tuning.calibration_file", ["torch", "triton", "vllm"]),
        ("triton_offload.tuning.fitting", ["torch", "triton", "vllm"]),
        ("triton_offload", ["torch", "triton", "vllm", "numpy"]),
        ("triton_offload.errors", ["torch", "triton", "vllm", "numpy"]),
        ("triton_offload.scheduler.manager", ["torch", "triton", "vllm"]),
        ("triton_offload.offloader", ["vllm", "typer", "rich"]),
        ("triton_offload.kernels.pages", ["triton_offload.specs", "vllm"]),
        ("triton_offload.cli.main", ["vllm"]),
    ],
)
def test_a_part_loads_no_more_than_it_needs(module, forbidden):
    code = (
        f"import sys, {module}\n"
        f"loaded = [name for name in {forbidden!r} if name in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_only_the_plug_in_and_the_demo_name_vllm():
    users = [
        name
        for name, file in modules().items()
        if any(
            (isinstance(node, ast.Import) and node.names[0].name.split(".")[0] == "vllm")
            or (
                isinstance(node, ast.ImportFrom)
                and node.level == 0
                and (node.module or "").split(".")[0] == "vllm"
            )
            for node in ast.walk(ast.parse(file.read_text()))
        )
    ]
    assert all(name.split(".")[0] == "vllm" or name == "cli.demo" for name in users)
    assert not {"vllm.versions", "vllm.stale_regions", "vllm.options"} & set(users)


def loaded_with(file: Path) -> set[str]:
    """What importing a file of tests imports: packages of others, by way of its helpers too."""
    found: set[str] = set()
    waiting = [ast.parse(file.read_text())]
    while waiting:
        for node in waiting.pop().body:
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module or ""}
            else:
                names = set()
                if isinstance(node, ast.With | ast.Try | ast.If):
                    waiting.append(node)
            for name in names - found:
                helper = TESTS / f"{name}.py"
                if helper.is_file():
                    waiting.append(ast.parse(helper.read_text()))
            found |= names
    return found


def test_no_test_of_the_quick_loop_imports_vllm():
    """Each process of `make quick` would, and it takes seconds."""
    users = {
        file.name
        for file in TESTS.glob("test_*.py")
        if any(name.split(".")[0] == "vllm" for name in loaded_with(file))
    }
    assert users
    assert users <= SLOW_FILES
