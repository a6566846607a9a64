"""One thread: the tests' matrices are tiny, and two threads that wait for each other on a busy machine are ten times slower."""

import torch

torch.set_num_threads(1)
