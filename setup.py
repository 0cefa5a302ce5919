"""The native build: one plain shared library, shadowc/_native*.so, from kernels/cpu/*.cpp.

Everything else about the package is in pyproject.toml. The library knows nothing of PyTorch or of
the Python headers; it picks its instruction set when it is loaded, so no -march is given.
"""

from glob import glob
from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "shadowc._native",
            sources=sorted(glob("kernels/cpu/*.cpp")),
            depends=sorted(glob("kernels/cpu/*.h")),
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-g0",  # after Python's own -g: debug information names the folder of the build
                f"-ffile-prefix-map={Path(__file__).resolve().parent}=.",
            ],
            extra_link_args=["-pthread"],
            language="c++",
        )
    ]
)
