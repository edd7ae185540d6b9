"""Installs the folders `teachers` and `eval` inside the package, as their names are too general for top-level packages.

Also builds the C part of replay if there is a compiler. Without it the package is complete but slower.
"""

import platform
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

STABLE = "0x030B0000"  # Python's stable interface of 3.11: one build for all later versions
AVX2 = Extension(
    "fkd_ssl.crops._avx2",
    ["fkd_ssl/crops/_avx2.c"],
    define_macros=[("Py_LIMITED_API", STABLE)],
    extra_compile_args=["-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"],
    libraries=["m"],
    py_limited_api=True,
    optional=True,
)
BUILT = platform.machine() in ("x86_64", "AMD64") and not sysconfig.get_config_var("Py_GIL_DISABLED")


class Wheel(bdist_wheel):
    """Tags the wheel for any platform if the C part could not be built."""

    def run(self):  # noqa: D102
        self.run_command("build_ext")
        if not any(Path(path).exists() for path in self.get_finalized_command("build_ext").get_outputs()):
            self.distribution.ext_modules, self.root_is_pure = [], True
        super().run()


setup(
    cmdclass={"bdist_wheel": Wheel},
    packages=[
        *find_packages(include=["fkd_ssl", "fkd_ssl.*"]),
        "fkd_ssl.teachers",
        "fkd_ssl.eval",
    ],
    package_dir={"fkd_ssl": "fkd_ssl", "fkd_ssl.teachers": "teachers", "fkd_ssl.eval": "eval"},
    ext_modules=[AVX2] if BUILT else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if BUILT else {},
    package_data={"fkd_ssl": ["py.typed", "comparison/report.html.jinja", "crops/digest.jpg", "photos/*"]},
)
