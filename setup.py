"""Package the folders at the top as subpackages of promag; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

subpackages = find_packages(exclude=["promag", "promag.*", "tests", "tests.*"])
setup(
    packages=["promag", *(f"promag.{name}" for name in subpackages)],
    package_dir={"promag": "promag", **{f"promag.{name}": name.replace(".", "/") for name in subpackages}},
)
