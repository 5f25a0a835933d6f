"""Builds the C++ library for CPUs where a compiler is present, and says so in one line where not.

All else about the package is in pyproject.toml.
"""

import importlib.util
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = Path("jmemserve/kernels/cpu")
NATIVE = LIBRARY / "native"
COMMON = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
FLAGS = {  # of the files that are for some processors only; which of them can run is found out when it is used
    "avx2.cc": ["-mavx2", "-mfma"],
    "avx512.cc": AVX512,
    "avx512bf16.cc": [*AVX512, "-mavx512bf16"],
}
X86, ARM = ["avx2.cc", "avx512.cc", "avx512bf16.cc"], ["neon.cc"]
MACHINES = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}


def headers() -> str:
    """The folder of XLA's headers, which come with jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("jaxlib is not there")
    return str(Path(spec.origin).parent / "include")


class BuildNative(build_ext):
    """Each file with flags of its own; a failure is not the end of the installation."""

    def build_extension(self, ext: Extension) -> None:
        try:
            objects = [
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=[str(NATIVE), headers()],
                    depends=ext.depends,
                    extra_postargs=COMMON + FLAGS.get(Path(source).name, []),
                )[0]
                for source in ext.sources
            ]
            path = Path(self.get_ext_fullpath(ext.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{os.getpid()}")  # half a library kills who loads it
            self.compiler.link_shared_object(objects, str(beside), target_lang="c++")
            beside.replace(path)
        except Exception as error:
            # An older library, of a build in place, may not be what today's package calls.
            (LIBRARY / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            print(f"jmemserve: the C++ library for CPUs is left out, XLA does its work, more slowly ({error})")


sources = [
    NATIVE / name
    for name in ("attention.cc", "products.cc", "moves.cc", "base.cc", *MACHINES.get(platform.machine(), []))
]
setup(
    ext_modules=[
        Extension(
            "jmemserve.kernels.cpu._native",
            [str(path) for path in sources],
            depends=[str(path) for path in sorted(NATIVE.glob("*.inc")) + sorted(NATIVE.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
