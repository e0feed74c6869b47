"""Metadata lives in pyproject.toml; this file holds what it cannot say: the package mapping and the native extension."""

from setuptools import setup

setup(
    # `kernels/` is imported as `amft_kernels`: transformers probes the import name `kernels` for another package.
    packages=["amft_fast", "amft_fast.engine", "amft_fast.rollout", "amft_fast.tasks", "amft_kernels"],
    package_dir={"amft_kernels": "kernels"},
)
