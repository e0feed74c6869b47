"""For tests of vLLM with pictures, on PYTHONPATH: torchvision's wheel from PyPI is a CUDA build, which a CPU build of torch
cannot load. Its Python part is all that image processors use, and comes in once the operators it registers are declared."""

import sys


class _Declare:
    """Declares them when torchvision is first asked for."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(_Declare)
            import torch

            operators = torch.library.Library("torchvision", "FRAGMENT")
            sys.modules[f"{__name__}.operators"] = operators  # it undeclares them when it goes
            for operator in ("nms", "qnms"):
                operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Declare)
