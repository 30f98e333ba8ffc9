"""Mutants that mean the same as the original, and why."""

from __future__ import annotations

_SAME_SHAPE = "the replacement must have the shape of the original, so nothing else is left out"
_ROUNDING = "the same over the reals: float16 would be rounded once more"
_ANY_TERM = "(x + a) + b = x + (a + b), and the same of factors, also for a value a"
_SIZES = (
    "the shape emitted is that of the value replaced, which several dynamic sizes only make "
    "longer to spell; measured right with two of them"
)
_ONE_PIECE = "a concatenation of one piece has its piece's shape and dtype"
_FEWER = "only refuses more; right where it still applies"
_NEGATED = "a - b = a + (-b) whatever they read: it only says where that is done"
# Mutants that mean the same as the original, or refuse more and are right where they apply:
# (function, change) -> the argument. Changes are spelled as the table prints them; "*" is any.
EQUIVALENT = {
    ("uniform", "return number if number in (0.0, 1.0) else None  ->  "
     "return number if number in (1.0, 1.0) else None"):
        f"a cast of a zero is not recognized any more: {_FEWER}",
    ("uniform", "if isinstance(op, (ops.Reshape, ops.Expand, ops.Permute, ops.Copy, ops.Detach)): "
     "return uniform(op.input)  ->  if False: return uniform(op.input)"):
        f"a view of a number is not recognized any more: {_FEWER}",
    ("uniform", "if state.kind != 'constant' or not 0 < tensor.numel() <= 4096 or "
     "tensor.is_complex():  ->  if state.kind != 'constant' or not 0 < tensor.numel() <= 4097 or "
     "tensor.is_complex():"): "a limit of the work, not of the meaning",
    ("_merge", "isinstance(inner.right, float) and isinstance(inner.left, Value)  ->  "
     "isinstance(inner.left, Value)"): _ANY_TERM,
    ("_merge", "isinstance(inner.right, float) and isinstance(inner.left, Value)  ->  "
     "isinstance(inner.right, float) or isinstance(inner.left, Value)"): _ANY_TERM,
    ("merge_casts", "rw.emit_like(outer, input=inner.input) if source != outer.dtype else "
     "inner.input  ->  rw.emit_like(outer, input=inner.input)"):
        "emits a cast to the dtype that the value has, which is the value",
    ("drop_view", "op.step == 1 and op.start in (0, None)  ->  op.start in (0, None)"): _SAME_SHAPE,
    ("drop_view", "rw.match(op.step == 1 and op.start in (0, None))  ->  "
     "rw.match(op.step == 1 and op.start in (1, None))"):
        f"no slice from 1 has the shape of its input: {_FEWER}",
    ("drop_view", "(0, None)  ->  (None, 0)"): "membership does not depend on the order",
    ("spell_out_shape", "rw.match(rw.root.target in (aten.reshape_as.default, aten.view_as.default"
     ", aten.expand_as.default))  ->  (nothing)"):
        "emits the same op with the same fields, whatever call it was spelled with",
    ("merge_permutes", "if dims == tuple(range(len(dims))): return inner.input  ->  "
     "if False: return inner.input"): "emits the identity permutation, which is the value",
    ("merge_reshapes", "if shape == inner.input.shape: return inner.input  ->  "
     "if False: return inner.input"): "emits a reshape to the shape that the value has",
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "(nothing)"): _SIZES,
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "rw.match(not sum((not isinstance(size, int) for size in shape)) <= 1)"): _SIZES,
    ("merge_reshapes", "sum((not isinstance(size, int) for size in shape)) <= 1  ->  "
     "sum((not isinstance(size, int) for size in shape)) > 1"): _SIZES,
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "rw.match(sum((not isinstance(size, int) for size in shape)) <= 2)"): _SIZES,
    ("merge_reshapes", "not isinstance(size, int)  ->  isinstance(size, int)"): _SIZES,
    ("merge_reshapes", "rw.emit_like(outer, input=inner.input, shape=shape)  ->  "
     "rw.emit_like(outer, input=inner.input)"):
        "the shape that the reshape was called with does too",
    ("drop_single_cat", "_same_type(op.tensors[0], rw, op.out)  ->  op.tensors[0]"): _ONE_PIECE,
    ("drop_single_cat", "rw.match(len(op.tensors) == 1)  ->  (nothing)"): _SAME_SHAPE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and value.shape == out.shape  ->  "
     "value.dtype == out.dtype"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and value.shape == out.shape  ->  "
     "value.shape == out.shape"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and value.shape == out.shape  ->  "
     "value.dtype == out.dtype or value.shape == out.shape"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "rw.match(value.dtype == out.dtype and value.shape == "
     "out.shape)  ->  (nothing)"): _ONE_PIECE,
    ("_extract[ops.Copy]", "rw.match(not getattr(op, 'train', False))  ->  "
     "rw.match(not getattr(op, 'train', True))"): f"a copy is refused: {_FEWER}",
    ("_extract[ops.Mean]", "by.axis - sum((dim < by.axis for dim in mean.dims))  ->  "
     "sum((dim < by.axis for dim in mean.dims)) - by.axis"):
        f"the axis is 0 as before, or negative and then refused by all that read it: {_FEWER}",
    ("merged_axis", "for last in range(axis + 1, len(before)):  ->  "
     "for last in range(axis + 2, len(before)):"):
        f"two axes merged into one are not recognized any more: {_FEWER}",
    ("written", "isinstance(other, Value) or other != 0  ->  other != 0"):
        "a value is never equal to a number",
    ("merged_axis", "before  ->  after"):
        f"counts fewer axes, or those beyond the last once more: {_FEWER}",
    ("merge_branches", "(branch(op.left), branch(op.right))  ->  "
     "(branch(op.right), branch(op.left))"): "the sum is the same either way round",
    ("merge_branches", "not alone  ->  alone"): "what goes away only enters the estimate of costs",
    ("merge_branches", "if not alone or value.op is None: break  ->  if False: break"):
        "what goes away only enters the estimate of costs",
    ("merge_branches", "i + j  ->  i"): f"an identity in front is no branch any more: {_FEWER}",
    ("absorb_number: _absorb[ops.Slice]", "rw.decline(f'its input is computed by {describe(whole)}, "
     "which a scale and shift cannot enter')  ->  (nothing)"):
        "a number has no axis, so it enters the whole that is sliced",
    ("extract", "rw.require(not others, 'its output is also read by ' + (describe(rw.value("
     "others[0])) if others else '') + ', which cannot take it in')  ->  (nothing)"):
        "what others read stays as it is: a cost, and right",
    ("into_conv", "conv.out  ->  conv.input"): "only enters the estimate of costs",
    ("_absorb[ops.Addmm]", "product.input.ndim - 1  ->  1 - product.input.ndim"):
        "axis 0 of one, or -1 of two: the last axis in both cases",
    ("scale_and_shift", "widen(self.bias)  ->  self.bias"): _ROUNDING,
    ("written", "widen(other)  ->  other"): _ROUNDING,
    ("_steps", "if _pointwise(outer) or inner.dilation == reach: return (inner.dilation, ones, ones)"
     "  ->  if False: return (inner.dilation, ones, ones)"):
        "the general way, with zeros for the taps between, is right here too",
    ("_steps", "outer  ->  inner"): "both have as many axes",
    ("_plain", "left.input  ->  left.out"): "a convolution keeps the number of axes",
    ("merge_linears: compose_maps", "isinstance(outer, ops.Linear) and isinstance(inner, ops.Linear)"
     "  ->  isinstance(outer, ops.Linear) or isinstance(inner, ops.Linear)"): "both are linear maps",
    ("stack_concatenated: _features", "one.out.ndim - 1  ->  one.out.ndim"):
        f"linear maps are not recognized any more: {_FEWER}",
    ("stack_siblings: _alike", "return False  ->  return True"):
        "weights that are computed are stacked at every call: a cost, and right",
    ("keeps_sign", "scale is None or bool(scale > 0)  ->  scale is None"):
        f"no number passes a ReLU any more: {_FEWER}",
    ("drop_key_bias", "attention.key != attention.value and attention.key != attention.query  ->  "
     "attention.key != attention.value or attention.key != attention.query"):
        "a key that is also the query or the value is computed twice: a cost, and right",
    ("move_value_bias", "widen(outer.weight, bias)  ->  outer.weight"):
        "the other factor is widened, and a product has the wider dtype of the two",
    ("add_negative_branch: _meeting", "*"): _NEGATED,
    ("add_negative_branch: branch", "*"): _NEGATED,
    ("add_negative_branch: margins", "*"): _NEGATED,
    ("_grown", "type(count) is int  ->  type(count) is not int"): "emits a padding by no zeros",
    ("margins", "before  ->  after"): "the two are equal where the sizes are used",
    ("margins", "pad.input.ndim - 2  ->  2 - pad.input.ndim"): f"no frame is found: {_FEWER}",
    ("margins", "pad.input  ->  pad.out"): "padding keeps the number of axes, all it is for",
    ("_through_pool", "pool.input  ->  pool.out"): "a pool keeps the number of axes, all it is for",
    ("_through_pad", "pad.mode != 'constant' or (by.shift is None and (pad.value is None or "
     "pad.value == 0))  ->  pad.mode != 'constant' and (by.shift is None and (pad.value is None or "
     "pad.value == 0))"): f"both are demanded where one suffices: {_FEWER}",
    ("_absorb[ops.Copy]", "rw.require(not getattr(op, 'train', False), f'{describe(op.out)} drops "
     "at random')  ->  rw.require(not getattr(op, 'train', True), f'{describe(op.out)} drops at "
     "random')"): f"a copy is refused: {_FEWER}",
}  # fmt: skip
