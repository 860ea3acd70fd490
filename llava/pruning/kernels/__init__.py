"""GPU kernels of the selection, imported only where they run; their results equal those of the torch code."""

MAX_RESIDUAL = 4096  # residual tokens per row; longer rows use the torch code
