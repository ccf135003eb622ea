import torch

from sparselab.memory import PeakMemory


def test_a_short_large_tensor_is_seen():
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as during:
        for _ in range(5):
            torch.ones(30_000_000).sum()  # 120 MB, released at once
    assert during.bytes > before.bytes + 80e6
