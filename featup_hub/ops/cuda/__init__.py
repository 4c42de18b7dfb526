"""The fused CUDA kernels: sources in ``csrc``, and the code that compiles and launches them.

``backend`` launches; ``programs`` compiles and loads; ``nvrtc``, ``cache`` and ``driver`` are the
compiler, the folder of compiled kernels and the CUDA driver.
"""
