"""The Triton kernels: one module an op, imported only where a GPU tensor asks for it (or a test, interpreted)."""
