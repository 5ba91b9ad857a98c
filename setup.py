"""Packaging. Every fact comes from settings.ini, which nbdev reads too, so that none is written twice."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser()
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

stages = {"1": "Planning", "2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    license="MIT",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {stages[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering",
        "Typing :: Typed",
    ],
    package_dir={"": "."},  # an editable install is then one line that names this folder, which editors follow too
    packages=find_packages(include=["clusterweights", "clusterweights.*"]),
    package_data={"clusterweights": ["py.typed", "data/*.csv.gz", "data/*.md"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "solvers": cfg["solvers_requirements"].split(), "trials": cfg["trials_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        # nbdev finds the index of documented names through this.
        "nbdev": ["clusterweights = clusterweights._modidx:d"],
    },
    zip_safe=False,
)
