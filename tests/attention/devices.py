"""Where the kernel tests run: on the GPU, or on a CPU in Triton's interpreter, whose bfloat16 arithmetic is wrong."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW_PRECISION = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
