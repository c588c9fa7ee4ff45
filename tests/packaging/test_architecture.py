"""Architecture rules: layering of imports, forbidden calls, and sizes of files and functions."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("_pb2.py", "_pb2_grpc.py")
ROOMS = ("engine", "kernels", "scheduler", "benchmarks")
FILES = sorted(
    path
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if not path.name.endswith("_pb2.py")
)

# From bottom to top; a package imports only from itself and from layers above it in this list.
LAYERS = [
    ("proto", "scheduler", "kernels"),
    ("engine.errors",),
    ("engine.utils",),
    ("engine.config",),
    ("engine.model",),
    ("engine.runner",),
    ("engine.worker", "engine.structured_output", "engine.media", "engine.tool_calling"),
    ("engine.input",),
    ("engine.outputs",),
    ("engine.observability",),
    ("engine.core",),
    ("engine.request_stream",),
    ("engine.async_llm", "engine.llm", "engine.client"),
    ("engine.server",),
    ("engine.server.http_api",),
    ("engine.server.grpc_api",),
    ("engine.replicas", "engine.cli"),
    ("benchmarks",),
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
EXCEPTIONS = {("engine.cli", "benchmarks")}  # `octavo bench`


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str | None:
    return max(
        (r for r in LEVEL if module == r or module.startswith(r + ".")), key=len, default=None
    )


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute names of a file's imports, without the prefix `octavo.`."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("octavo.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = [*base, node.module] if node.module else base
            for alias in node.names:
                full = ".".join([*module, alias.name])
                yield (
                    full
                    if (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                    else (".".join(module))
                )
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").removeprefix("octavo.")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_layers(path: Path) -> None:
    here = room_of(name_of(path))
    for module in imports(path):
        there = room_of(module)
        if there is None or there == here or (here, there) in EXCEPTIONS:
            continue
        assert here is not None and LEVEL[there] < LEVEL[here], f"{here} imports {module}"


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("scheduler", set(sys.stdlib_module_names)),
        ("kernels", {*sys.stdlib_module_names, "torch", "triton"}),
    ],
)
def test_packages_import_only_allowed_modules(room: str, allowed: set[str]) -> None:
    for path in (ROOT / room).glob("*.py"):
        for module in imports(path):
            assert module.split(".")[0] in {*allowed, room}, f"{path.name} imports {module}"


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.lesson("L24")
def test_pickle() -> None:
    """No pickle anywhere, including torch's between ranks; only Unix sockets and loopback."""
    for path in FILES:
        wrong = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}
        assert not wrong & {module.split(".")[0] for module in imports(path)}, path
        assert not any(call.endswith(("_object", "_object_list")) for call in calls(path)), path
    folder = ROOT / "engine/worker"
    paths = folder.rglob("*.py")
    inside = {path.relative_to(folder).as_posix(): path.read_text() for path in paths}
    for call in ("insecure_channel(", "add_insecure_port("):
        found = {name: text for name, text in inside.items() if call in text}
        assert all(text.count(call) == 1 for text in found.values())
        apart = found.keys() & {
            "remote/join.py",
            "remote/worker.py",
        }  # test_remote_workers: on loopback
        assert len(apart) == 1 and len(found) == 2
        assert any(f'{call}f"unix:' in text for text in found.values())
    assert '"GLOO_SOCKET_IFNAME": "lo"' in inside["process.py"]


@pytest.mark.lesson("L25")
def test_torch_load() -> None:
    """Weights are loaded only from safetensors and nothing is evaluated, except for training."""
    for path in FILES:
        if "demo_model" in path.parts:
            continue
        for call in calls(path):
            assert call not in ("torch.load", "eval", "exec", "__import__", "os.system"), path
            assert not call.endswith("trust_remote_code"), path


def test_files_are_short() -> None:
    for path in FILES:
        lines = path.read_text().count("\n")
        assert lines <= 350, f"{path}: {lines} lines"


def test_functions_are_short() -> None:
    """Functions have at most 60 lines, except kernels; nine in ten have under 32."""
    sizes = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno
                sizes.append(size)
                kernel = node.name.startswith("_") and node.name.endswith("_kernel")
                training = path.name == "train.py"
                assert size <= 60 or kernel or training, f"{path}:{node.lineno} {node.name}"
    sizes.sort()
    assert sizes[len(sizes) * 9 // 10] < 32


def test_every_folder_is_a_package() -> None:
    """setup.py installs only folders that have an `__init__.py`."""
    for path in FILES:
        assert (path.parent / "__init__.py").exists(), path
