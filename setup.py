"""Packaging of Octavo: the repository root is the package `octavo`.

Folders such as `engine/` and `kernels/` are installed as `octavo.engine` and `octavo.kernels`, so
that no package named `kernels` or `proto` is added to site-packages.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = ("benchmarks", "engine", "kernels", "proto", "scheduler")
PACKAGES = ["octavo", "octavo.engine.embedded"]
for folder in FOLDERS:
    for path in sorted((ROOT / folder).rglob("__init__.py")):
        PACKAGES.append(".".join(["octavo", *path.parent.relative_to(ROOT).parts]))


class BuildWithoutSetup(build_py):
    """Build command that packages every module except this file."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if (m[0], m[1]) != ("octavo", "setup")]


# Kernels for CPUs with AVX512-BF16, loaded if the CPU supports it. They are optional: without a
# compiler that supports the instructions, the package is installed without them. OpenMP is not
# linked; torch's runtime is used (kernels/native/__init__.py).
NATIVE = Extension(
    "octavo.kernels.native._kernels",
    sources=[
        f"kernels/native/{name}.c"
        for name in ("amx", "attention", "decode", "layers", "linear", "meet", "rows")
    ],
    depends=[
        f"kernels/native/{name}.h" for name in ("amx", "bf16", "kernels", "product", "transpose")
    ],
    extra_compile_args=[
        "-O3",
        "-march=x86-64-v4",
        "-mavx512bf16",
        "-mavx512vnni",
        "-fopenmp",
        "-fvisibility=hidden",
    ],
    libraries=["m"],
    optional=True,
)

OTEL = ["opentelemetry-sdk>=1.27,<2", "opentelemetry-exporter-otlp-proto-http>=1.27,<2"]
HTTP = ["starlette>=0.46", "uvicorn>=0.34"]
# The router base class is an alpha API of Ray; tested with this release.
RAY = [*HTTP, "ray[serve]>=2.60,<3"]

TEST = [
    *OTEL,
    *RAY,
    "kubernetes-validate>=1.37",
    "celery>=5.5",
    "openai>=3",
    "httpx2>=2",
    "jsonschema>=4.23",
    "transformers>=5.23,<6",
    "huggingface_hub>=1.0",
    "modelscope>=1.40",
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-asyncio>=1.0",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "psutil>=7",
    "cryptography>=42",
    "matplotlib>=3.8",
    "playwright>=1.55",
    "axe-playwright-python>=0.1.4",
    "ruff>=0.17",
    "mypy>=2.0",
    "types-protobuf",
]

setup(
    name="octavo",
    version="0.1.0",
    description="An engine that serves Qwen2-VL: paged memory, continuous batching, vision stage",
    python_requires=">=3.11",
    package_dir={"octavo": "."},
    packages=PACKAGES,
    package_data={
        "octavo.engine.embedded": ["*.json", "*.safetensors"],
        "octavo.engine.server": ["page/*"],
        "octavo.proto": ["*.proto", "*.pyi"],
        "octavo": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "safetensors>=0.5",
        "tokenizers>=0.21.1",
        "llguidance>=1.8,<2",
        "pillow>=11.1",
        "av>=17.1",
        "grpcio>=1.62",
        "grpcio-health-checking>=1.62",
        "grpcio-reflection>=1.62",
        "grpcio-status>=1.62",
        "googleapis-common-protos>=1.63",
        "protobuf>=4.25",
        "jinja2>=3.1",
        "typer>=0.15",
        "rich>=13",
        "urllib3>=2.6,<3",
        "prometheus_client>=0.22",
    ],
    extras_require={
        "test": TEST,
        "hub": ["huggingface_hub>=0.30", "modelscope>=1.40"],
        "http": HTTP,
        "ray": RAY,
        "plot": ["matplotlib>=3.8"],
        "otel": OTEL,
    },
    entry_points={"console_scripts": ["octavo=octavo.engine.cli.main:main"]},
    ext_modules=[NATIVE],
    cmdclass={"build_py": BuildWithoutSetup},
)
