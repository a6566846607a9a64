"""One thread: the tensors here are tiny, and on shared cores torch's waiting threads make the same tests ten times slower."""

import torch

torch.set_num_threads(1)
