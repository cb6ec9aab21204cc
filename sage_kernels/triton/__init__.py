"""The Triton backend: quantize.py and attention.py are the kernels, exact.py the guard, launch.py allocates and launches."""
