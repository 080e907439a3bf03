"""Each algorithm as one would write it on a board: one program a row, no vectors, no tricks.

The tests compare them with torch and with the tuned kernels; the benchmark times them as the peer "plain", so that a
reader sees what tuning bought. The tensors are contiguous, the arithmetic is fp32, and a row fits into one block.
"""
