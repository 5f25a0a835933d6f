"""``python -m jmemserve.kernels.cpu``: is the C++ library there, and what does it use?"""

from jmemserve.kernels.cpu.library import describe

print(describe())
