"""The compiled part; everything else is in pyproject.toml, where setuptools still calls extensions experimental."""

from setuptools import Extension, setup

# optional: where no C compiler is at hand the package installs all the same and counts with the reference table
native = Extension("statbuffer._table._native", ["src/statbuffer/_table/_native.pyx"], optional=True)

setup(ext_modules=[native])
