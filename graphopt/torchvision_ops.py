"""Lets `import torchvision` work where its compiled ops do not load.

torchvision describes its compiled ops to the compiler while it is imported, and fails there when
their library was built for another torch (a CUDA wheel beside a CPU build of torch). The
classifiers use none of these ops; to import them, the ops' schemas are enough. An op that is only
declared has no kernel: torchvision says so itself when one is called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

import torch

_ROIS = "Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_IMAGE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_CONV = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
    "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask"
)
_DEFORM = f"Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_CONV}"
_MAPPED = f"Tensor grad, Tensor rois, Tensor channel_mapping, {_ROIS.partition(', ')[2]}"

# As registered by torchvision/csrc/ops/*.cpp of torchvision 0.28.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, {_ROIS}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, {_ROIS}, {_IMAGE}, int sampling_ratio, bool aligned)"
    " -> Tensor",
    f"roi_pool(Tensor input, {_ROIS}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_ROIS.partition(', ')[2]}, "
    f"{_IMAGE}) -> Tensor",
    f"ps_roi_align(Tensor input, {_ROIS}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({_MAPPED}, int sampling_ratio, {_IMAGE}) -> Tensor",
    f"ps_roi_pool(Tensor input, {_ROIS}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({_MAPPED}, {_IMAGE}) -> Tensor",
    f"deform_conv2d({_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_library: torch.library.Library | None = None  # a registration lives as long as its library


def declare_missing_ops() -> bool:
    """Declare torchvision's ops if its own library does not load; call before importing it.

    Returns whether ops were declared (now or by an earlier call). Does nothing where torchvision is
    missing or works.
    """
    global _library
    if _library is None and not ("torchvision" in sys.modules or _present() or _load_compiled()):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            _library.define(schema)
    return _library is not None


def _present() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _load_compiled() -> bool:
    """Whether torchvision needs no help: it is not installed, or its library loads."""
    package = importlib.util.find_spec("torchvision")
    if package is None:
        return True
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    loader = (importlib.machinery.ExtensionFileLoader, suffixes)
    for folder in package.submodule_search_locations or ():
        # As torchvision.extension finds it; importing torchvision is what cannot be done yet.
        library = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
        if library is not None and library.origin is not None:
            try:
                torch.ops.load_library(library.origin)
            except (ImportError, OSError):
                return False
            return True
    return False
