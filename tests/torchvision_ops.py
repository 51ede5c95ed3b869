"""Makes torchvision's wheel, built for CUDA, importable beside torch for a CPU: `pytest -p tests.torchvision_ops`.

Its import asks for two operators that only CUDA's torch has. Declared, they are enough for its transforms, and so for
the video processors of transformers. For tests alone.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")  # what is declared lives as long as this
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
