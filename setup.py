"""Builds the native code with CMake and Ninja; CMakeLists.txt says what there is to build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str) -> str:
    """The tool of the running Python's environment, else the one on the PATH."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=beside)
    if path is None:
        raise SystemExit(f"rnnkern needs {name} to build: pip install {name}")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11  # noqa: F401
            import torch  # noqa: F401
        except ImportError as error:
            raise SystemExit(
                f"rnnkern builds against the torch that is installed, and {error.name} is not found: "
                "install torch and pybind11 first, then pip install --no-build-isolation ."
            ) from None
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise SystemExit("rnnkern needs a C++17 compiler: install g++ 11 or later (apt install g++)")
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake")
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRNNKERN_VERSION={self.distribution.get_version()}",
        ]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run([cmake, "--build", build], check=True)
        subprocess.run([cmake, "--install", build], check=True)


setup(ext_modules=[Extension("rnnkern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
