"""Builds the pure-Python wheel.

Metadata is in pyproject.toml. This file only maps the top-level ``weights/`` folder, where
people look for it, to the package ``featup_hub.weights_data``, where the wheel carries it.
Nothing is compiled here: the CUDA kernel is built at first use.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["featup_hub", "featup_hub.*"]), "featup_hub.weights_data"],
    package_dir={"featup_hub.weights_data": "weights"},
    package_data={
        "featup_hub": ["py.typed"],
        "featup_hub.ops.cuda": ["csrc/*.cu", "csrc/*.cuh"],
        "featup_hub.weights_data": ["*.safetensors", "*.md", "*.json"],
    },
)
