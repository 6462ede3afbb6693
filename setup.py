"""For `python setup.py develop`; pyproject.toml says it all."""

from setuptools import setup

setup()
