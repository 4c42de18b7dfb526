"""The fused CUDA kernels: sources in ``csrc``, the code that compiles and launches them here.

``backend`` launches, ``program`` compiles and loads, ``nvrtc``, ``cache`` and ``driver`` are the
compiler, the folder of compiled kernels and the CUDA driver.
"""
