"""Metadata and requirements. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# decord 0.6.0 has wheels for these platforms only; elsewhere the PyAV reader does its work.
DECORD_WHEELS = "(sys_platform == 'linux' and platform_machine == 'x86_64') or sys_platform == 'win32'"

REQUIREMENTS = [
    "torch>=2.4",
    "torchvision>=0.19",
    "pytorchvideo>=0.1.5",
    f"decord>=0.6.0; {DECORD_WHEELS}",
    "av>=17.1",  # 17.0 crashes when it opens flv with options
    "timm>=1.0.9",
    "einops>=0.8",
    "huggingface_hub>=0.34",  # folders and repositories of models; timm needs it too
    "Jinja2>=3.1.2",  # model cards and pages
    "pebble>=5.0",  # processes that may hang or crash on a file
    "submitit>=1.5.4",  # before it, `pkg_resources`, which setuptools 82 has removed
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pandas>=2.2",
    "pillow>=10.3",
    "psutil>=5.9",
    "pyarrow>=15",
    "pydantic>=2.7",
    "PyYAML>=6.0.1",
    "rich>=13.7",
    "safetensors>=0.8",  # before, `save_file` held the GIL: a rank that saves for long gave no sign of life
    "scipy>=1.11.2",
    "tensorboard>=2.16",
    "typer>=0.20",  # 0.12.4 fails with click 8.5; between the two, nothing was tried to the end
]

SERVE = ["starlette>=0.41", "uvicorn>=0.32"]
# ONNX files. `torch.onnx.export` takes a `custom_translation_table` from torch 2.6 on; the tests ran with 2.12.
ONNX = ["torch>=2.6", "onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]

EXTRAS = {
    "export": ONNX,
    "energy": ["nvidia-ml-py>=12.535"],  # joules per clip of a GPU; imported as pynvml
    "serve": SERVE,
    "docs": [
        "mkdocs>=1.6,<2",  # 2 has neither hooks nor themes of others
        "mkdocs-material>=9.6",
    ],
    "test": [
        *SERVE,
        *ONNX,
        "ipykernel>=6.20",  # runs docs/python.ipynb
        "nbclient>=0.8",
        "nbformat>=5.7",
        "playwright>=1.49",  # drives the distribution's Chromium; tests/browser.py
        "pytest>=8",
        "pytest-cov>=7",
        "jsonschema>=4.21",  # checks the configs against their schema, as editors do
        "coverage>=7.10",  # measures the processes that the tests start
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "transformers>=4.41",  # its TimeSformer is the independent implementation of the parity tests
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML>=6",
        "setuptools>=77",  # a test installs the checkout without downloading its build requirements
    ],
}

setup(
    name="videoadapt",
    version="0.1.0",
    description="One video transformer at several operating points, and an assigner that picks one for each clip",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    # In a wheel, configs/ lies in the package, as videoadapt/configs; in a checkout, beside it.
    packages=[*find_packages(include=["videoadapt", "videoadapt.*"]), "videoadapt.configs"],
    package_dir={"videoadapt": "videoadapt", "videoadapt.configs": "configs"},
    package_data={
        "videoadapt": ["py.typed"],
        "videoadapt.commands.serve": ["*.html", "page.css", "page.js"],
        "videoadapt.data.index": ["kinetics*.txt"],
        "videoadapt.reporting": ["template/*", "template/vendor/*"],
        "videoadapt.configs": ["*.yaml", "ablations/*.yaml", "schema.json"],
    },
    # `pip install -e .` puts the checkout itself on the import path. setuptools' default is an import finder that comes
    # last: from the parent folder of a clone, `import videoadapt` would find the clone's folder, a namespace package.
    options={"editable_wheel": {"mode": "compat"}},
    entry_points={"console_scripts": ["videoadapt = videoadapt.commands.cli:main"]},
)
