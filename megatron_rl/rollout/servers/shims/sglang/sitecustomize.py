"""Lets SGLang start beside a torch without CUDA; Python runs this at start-up where the folder is on PYTHONPATH, in
the processes that SGLang spawns too."""

import importlib.abc
import sys
from typing import Any

_libraries: list[Any] = []  # an operator vanishes with its library object


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """PyPI's torchvision has a C++ part that wants CUDA. Without it two operators are undeclared, and importing
    torchvision fails; nothing calls them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name != "torchvision" or _libraries:
            return
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
