"""Maps the top-level folders `teachers` and `eval` into the package: their names are too general to be installed."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fkd_ssl", "fkd_ssl.*"]),
        "fkd_ssl.teachers",
        "fkd_ssl.eval",
    ],
    package_dir={"fkd_ssl": "fkd_ssl", "fkd_ssl.teachers": "teachers", "fkd_ssl.eval": "eval"},
    package_data={"fkd_ssl": ["py.typed", "comparison/report.html.jinja", "crops/probe.jpg"]},
)
