"""Builds the compiled convolution where a C++ compiler is there; all else: pyproject.toml."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "mlip_md.native.libconvolution"
SOURCES = Path("mlip_md/native")


def convolution() -> list[Extension]:
    """The library, if there are the headers of XLA to build it against."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if sys.platform == "win32" or jaxlib is None or jaxlib.origin is None:
        return []
    return [
        Extension(
            NAME,
            [str(SOURCES / "conv.cc"), str(SOURCES / "sets.cc")],
            depends=[str(file) for file in sorted(SOURCES.glob("*.h"))],
            # Products may be fused with sums; nothing else may be rounded or dropped.
            extra_compile_args=[
                # not an include_dir: warnings of its headers are not ours to mend
                f"-isystem{Path(jaxlib.origin).with_name('include')}",
                "-std=c++17",
                "-O2",
                "-g0",
                "-fno-fast-math",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
                "-Wno-psabi",
            ],
            language="c++",
            optional=True,
        )
    ]


class BuildLibrary(build_ext):
    """A library by its C interface: its name does not depend on the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library of a module name."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """What is exported: no function that starts a module."""
        return list(ext.export_symbols)

    def built(self) -> bool:
        """Whether there is a library."""
        return any(Path(self.get_ext_fullpath(ext.name)).exists() for ext in self.extensions)


class Wheel(bdist_wheel):
    """For every version of Python, and for one platform only if there is a library in it."""

    def run(self) -> None:
        """Build the library first, to know whether there is one."""
        self.run_command("build_ext")
        self.root_is_pure = not self.get_finalized_command("build_ext").built()
        if self.root_is_pure:
            self.distribution.ext_modules = []  # else all would lie where a platform's files do
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Versions of Python, of its binary interface, and platform."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": Wheel}
setup(ext_modules=convolution(), cmdclass=commands)
