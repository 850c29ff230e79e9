"""Builds the native code with CMake and Ninja; CMakeLists.txt says what there is to build.

RNNKERN_EXTENSION=0 builds none: the wheel is Python alone, for every platform, and its GPU kernels are those in Triton.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WANTED = os.environ.get("RNNKERN_EXTENSION", "1")
if WANTED not in ("0", "1"):
    raise SystemExit(f"RNNKERN_EXTENSION must be 0 or 1, got {WANTED!r}")


def find_tool(name: str) -> str:
    """The tool of the running Python's environment, else the one on the PATH."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=beside)
    if path is None:
        raise SystemExit(f"rnnkern needs {name} to build: pip install {name}")
    return path


def check_tools() -> None:
    try:
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"rnnkern builds against the torch that is installed, and {error.name} is not found: "
            "install torch and pybind11 first, then pip install --no-build-isolation ."
        ) from None
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        raise SystemExit(f"rnnkern needs a C++17 compiler, and {compiler} is not found (apt install g++, 11 or later)")


class FreshBuild(build):
    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # else a file deleted from the tree lives on in the wheel
        super().run()
        if WANTED == "0":  # so that nobody is told to build what was left out on purpose
            Path(self.build_lib, "rnnkern", "without_extension").touch()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_tools()
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake")
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRNNKERN_VERSION={self.distribution.get_version()}",
            f"-DRNNKERN_EMULATOR={'ON' if self.editable_mode else 'OFF'}",  # for those who work on the kernels
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *configure], check=True)
        subprocess.run([cmake, "--build", build_dir], check=True)
        subprocess.run([cmake, "--install", build_dir], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install: setuptools copies `_C`; the libraries go beside it."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("rnnkern"))
        for library in (Path(self.build_lib) / "rnnkern").glob("lib*.so"):
            self.copy_file(str(library), str(package / library.name))


setup(
    ext_modules=[Extension("rnnkern._C", sources=[])] if WANTED == "1" else [],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
