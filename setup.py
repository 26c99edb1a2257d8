"""Package the folders at the top as subpackages of promag; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

rooms = find_packages(exclude=["promag", "promag.*", "tests", "tests.*"])
setup(
    packages=["promag", *(f"promag.{room}" for room in rooms)],
    package_dir={"promag": "promag", **{f"promag.{room}": room.replace(".", "/") for room in rooms}},
)
